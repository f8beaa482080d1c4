"""Slow, plain restatements of what pruning means: one unpadded sample at a time, whole sequences, no cache.

A dropped token stays in the sequence and is masked as a key from its layer on; nothing is ever removed. The
models are unmodified Hugging Face models with ``attn_implementation="eager"``; hooks placed here live for one
call. The statistics at the end are loops over rows, on Python's own numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

Sample = dict[str, Tensor]
IMAGE_ID_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def segments(model: PreTrainedModel, sample: Sample) -> dict[str, list[int]]:
    """Positions of system, image and instruction tokens; text between images is none of them."""
    config = model.config.to_dict()
    media = {config[name] for name in IMAGE_ID_NAMES if name in config}
    image = []
    for position, token in enumerate(sample["input_ids"][0].tolist()):
        if token in media:
            image.append(position)
    length = sample["input_ids"].shape[1]
    if not image:
        return {"system": list(range(length)), "image": [], "instruction": []}
    return {
        "system": list(range(image[0])),
        "image": image,
        "instruction": list(range(image[-1] + 1, length)),
    }


@torch.no_grad()
def masked_forward(
    model: PreTrainedModel,
    sample: Sample,
    dropped: dict[int, set[int]],
    position_ids: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Run the model with ``dropped[k]`` masked as keys from layer k on.

    Returns the logits (sequence, vocab) and each layer's attention (heads, query, key). Rows of dropped
    tokens mean nothing, and nobody reads them. ``position_ids`` replaces what the text decoder is given.
    """
    decoder = model.get_decoder()
    assert decoder.config._attn_implementation == "eager", "the oracle reads eager attention"
    assert sample["input_ids"].shape[0] == 1, "the oracle takes one sample at a time"
    assert bool(sample["attention_mask"].all()), "the oracle takes unpadded samples"
    attentions: list[Tensor] = []

    def place(module, args, kwargs):
        return args, kwargs | {"position_ids": position_ids}

    def hide(columns):
        def hook(module, args, kwargs):
            mask = kwargs["attention_mask"].clone()
            assert mask.is_floating_point()
            assert mask.shape[-1] == sample["input_ids"].shape[1]
            # not -inf: the row of a dropped token with no key left must stay finite
            mask[..., columns] = torch.finfo(mask.dtype).min
            return args, kwargs | {"attention_mask": mask}

        return hook

    def note(module, args, output):
        attentions.append(output[1][0].float())

    with ExitStack() as stack:
        if position_ids is not None:
            stack.enter_context(decoder.register_forward_pre_hook(place, with_kwargs=True))
        for index, layer in enumerate(decoder.layers):
            columns = sorted({p for k, positions in dropped.items() if k <= index for p in positions})
            if columns:
                stack.enter_context(layer.register_forward_pre_hook(hide(columns), with_kwargs=True))
            stack.enter_context(layer.self_attn.register_forward_hook(note))
        logits = model(**sample, use_cache=False).logits[0]
    return logits, attentions


def kept_sets(pruner, model: PreTrainedModel, sample: Sample) -> tuple[dict[int, list[int]], float]:
    """Image positions that stay from each pruning layer on, and the smallest relative score margin at a cut.

    A method is known by the name of its class, and restated here from its fields alone.
    """
    where = segments(model, sample)
    n = len(where["image"])
    last = [sample["input_ids"].shape[1] - 1]
    # a stage: layer, how many stay, the layer whose attention ranks, its queries (None: image tokens left)
    match type(pruner).__name__:
        case "HiMAP":
            first = round((1 - pruner.r1) * n)
            second = round((1 - pruner.r2) * first)
            stages = [
                (pruner.k1, first, pruner.k1 - 1, where["instruction"]),
                (pruner.k2, second, pruner.k2 - 1, None),
            ]
        case "FastV":
            stages = [(pruner.k, round((1 - pruner.ratio) * n), pruner.k - 1, last)]
        case "PyramidDrop":
            keeps = [int(n * (1 - pruner.ratio) ** (i + 1)) for i in range(len(pruner.layers))]
            stages = [(layer, keep, layer, last) for layer, keep in zip(pruner.layers, keeps, strict=True)]
        case "VTW":
            return {pruner.k: []}, math.inf
        case "Random":
            keep = round((1 - pruner.ratio) * n)
            draws = torch.rand(n, generator=torch.Generator().manual_seed(pruner.seed)).tolist()
            return {pruner.k: largest(where["image"], draws, keep)[0]}, math.inf
        case "Uniform":
            keep = round((1 - pruner.ratio) * n)
            grid = [math.floor((j + 0.5) * n / keep) for j in range(keep)]
            return {pruner.k: [where["image"][i] for i in grid]}, math.inf
        case name:
            raise NotImplementedError(f"no restatement of {name}: add one here")

    kept: dict[int, list[int]] = {}
    dropped: dict[int, set[int]] = {}
    alive, smallest = where["image"], math.inf
    for layer, keep, ranking, queries in stages:
        if keep < len(alive):
            rows = alive if queries is None else queries
            assert rows, "nobody to rank the image tokens"
            attention = masked_forward(model, sample, dropped)[1][ranking].double().mean(0)
            received = attention[rows].sum(0)
            stay, margin = largest(alive, received[alive].tolist(), keep)
            dropped[layer] = set(alive) - set(stay)
            alive, smallest = stay, min(smallest, margin)
        kept[layer] = alive
    return kept, smallest


def largest(positions: list[int], scores: list[float], keep: int) -> tuple[list[int], float]:
    """Positions of the largest scores, of equals the earlier, in prompt order; and the margin at the cut."""
    ranked = sorted(zip(scores, positions, strict=True), key=lambda pair: (-pair[0], pair[1]))
    margin = math.inf
    if 0 < keep < len(ranked):
        worst, next_best = ranked[keep - 1][0], ranked[keep][0]
        margin = (worst - next_best) / worst if worst > next_best else 0.0
    return sorted(position for _, position in ranked[:keep]), margin


def drops(model: PreTrainedModel, sample: Sample, kept: dict[int, list[int]]) -> dict[int, set[int]]:
    """What ``masked_forward`` must hide so that only ``kept`` stays."""
    image = set(segments(model, sample)["image"])
    return {layer: image - set(stay) for layer, stay in kept.items()}


@torch.no_grad()
def reference_generate(model: PreTrainedModel, sample: Sample, pruner, new_tokens: int) -> tuple[list[int], Tensor]:
    """Greedy tokens and each step's logits (new_tokens, vocab), what is kept being settled on the prompt.

    A pruner of None prunes nothing.
    """
    kept = {} if pruner is None else kept_sets(pruner, model, sample)[0]
    dropped = drops(model, sample, kept)
    places = generation_positions(model, sample, new_tokens)
    tokens, steps = [], []
    for _ in range(new_tokens):
        length = sample["input_ids"].shape[1]
        here = None if places is None else places[..., :length]
        logits = masked_forward(model, sample, dropped, here)[0][-1]
        steps.append(logits)
        tokens.append(int(logits.argmax()))
        sample = extend(model, sample, tokens[-1])
    return tokens, torch.stack(steps)


def extend(model: PreTrainedModel, sample: Sample, token: int) -> Sample:
    """Append one generated token to the sample."""
    suffix = int(model.config.model_type == "paligemma")  # there 1 is the suffix, which is causal
    more = {"input_ids": token, "attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": suffix}
    return {
        key: torch.cat([value, value.new_full((1, 1), more[key])], 1) if key in more else value
        for key, value in sample.items()
    }


@torch.no_grad()
def generation_positions(model: PreTrainedModel, sample: Sample, new_tokens: int) -> Tensor | None:
    """Note the positions that unpruned generation gives the text decoder, prompt first.

    They do not depend on the tokens. None where the decoder counts by itself.
    """
    seen: list[Tensor | None] = []

    def note(module, args, kwargs):
        seen.append(kwargs["position_ids"])

    with model.get_decoder().register_forward_pre_hook(note, with_kwargs=True):
        model.generate(**sample, max_new_tokens=new_tokens, do_sample=False)
    return None if any(ids is None for ids in seen) else torch.cat(seen, -1)


def share_interval(rows: list[tuple[str, int]]) -> tuple[float, float]:
    """The 95 % interval of the share of rows (cluster, right or not) that are right: the p whose distance from the
    share, in standard errors at p of the rows' effective number, is at most 1.96; found by bisection."""
    clusters: dict[str, list[int]] = {}
    for cluster, right in rows:
        clusters.setdefault(cluster, []).append(right)
    n, m, share = len(rows), len(clusters), sum(right for _, right in rows) / len(rows)
    if 0 < share < 1 and m > 1:
        spread = sum((sum(right) - share * len(right)) ** 2 for right in clusters.values()) * m / (m - 1) / n**2
        simple = share * (1 - share) / (n - 1)
        effective = n / (spread / simple) if spread > simple else n
    else:
        effective = n * n / sum(len(right) ** 2 for right in clusters.values())

    def reached(p: float) -> bool:
        return (share - p) ** 2 * effective <= 1.959963984540054**2 * p * (1 - p)

    ends = []
    for outside in (0.0, 1.0):
        inside = share
        if not reached(outside):
            for _ in range(60):
                middle = (outside + inside) / 2
                outside, inside = (outside, middle) if reached(middle) else (middle, inside)
        ends.append(share if share == outside else inside)
    return ends[0], ends[1]


# -- statistics: whole clusters are drawn anew, row by row, and nothing is summed beforehand

Row = Sequence[float]


def resamples(rows: Sequence[Row], clusters: Sequence[object], seed: int, count: int = 2000) -> list[list[Row]]:
    """The rows of each resample: as many clusters as there are, drawn with replacement, each with all its rows."""
    names = sorted(set(clusters))
    drawn = np.random.default_rng(seed).integers(len(names), size=(count, len(names))).tolist()
    members = {name: [row for row, cluster in zip(rows, clusters, strict=True) if cluster == name] for name in names}
    return [[row for number in numbers for row in members[names[number]]] for numbers in drawn]


def mean(values: Sequence[float]) -> float:
    """The mean of what is there; nan where nothing is."""
    there = [value for value in values if not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan


def median(values: Sequence[float]) -> float:
    """The middle one, or halfway between the two in the middle."""
    ranked, half = sorted(values), len(values) // 2
    return ranked[half] if len(ranked) % 2 else (ranked[half - 1] + ranked[half]) / 2


def quotient(over: float, under: float) -> float:
    """A ratio that is not defined where its denominator is 0."""
    return over / under if under else math.nan


def middle_95(found: Sequence[float]) -> tuple[float, float, float]:
    """The 2.5th and the 97.5th percentile of what is defined, and the share of what is not."""
    ranked = sorted(value for value in found if not math.isnan(value))
    ends = []
    for share in (0.025, 0.975):
        below, rest = divmod(share * (len(ranked) - 1), 1)
        ends.append(ranked[int(below)] + rest * (ranked[math.ceil(below + rest)] - ranked[int(below)]))
    return ends[0], ends[1], 1 - len(ranked) / len(found)


def two_sided_p(found: Sequence[float]) -> float:
    """Twice the smaller share on a side of 0, the value itself counted as one resample on either; at most 1."""
    defined = [value for value in found if not math.isnan(value)]
    smaller = min(sum(value <= 0 for value in defined), sum(value >= 0 for value in defined))
    return min(1.0, 2 * (smaller + 1) / (len(defined) + 1))
