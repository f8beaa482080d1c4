"""What pruning means, restated on the unmodified model in eager mode: one sample at a time, whole sequences, no cache.

Where every layer attends, a dropped token stays and is hidden as a key from its layer on. A recurrent layer has no keys
to hide: where there are some, the token's row is taken out, and its neighbours move together.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from inputs import Family
from shrink import LAYERS
from torch import Tensor

from oracles import largest
from tiny import IMAGE, Sample
from vlmflow import Trace
from vlmflow.pruners import Pruner

Drops = dict[int, set[int]]  # the positions that go before a layer


@torch.no_grad()
def forward(
    family: Family, sample: Sample, drops: Drops, places: Tensor | None = None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits (sequence, vocab), and the attention (query, key) of each layer that attends, averaged over heads.

    What stands at dropped tokens means nothing. ``places`` replaces the positions that the text decoder is given.
    """
    length, layers = sample["input_ids"].shape[1], family.decoder.layers
    recurrent = not all(hasattr(layer, "self_attn") for layer in layers)
    attentions: dict[int, Tensor] = {}

    def place(module, args, kwargs):
        return args, {**kwargs, "position_ids": places}

    def note(index: int, rows: list[int]):
        def hook(module, args, output):
            attentions[index] = spread(spread(output[1][0].double().mean(0), rows, length).T, rows, length).T

        return hook

    with ExitStack() as stack:
        if places is not None:
            given = {"position_ids": places}
            hook = family.decoder.register_forward_pre_hook(
                lambda _, args, kwargs: (args, kwargs | given), with_kwargs=True
            )
            stack.enter_context(hook)
        rows = [*range(length)]
        for index, layer in enumerate(layers):
            gone = {position for start, positions in drops.items() if start <= index for position in positions}
            if gone and recurrent:
                before, rows = rows, [row for row in rows if row not in gone]
                stack.enter_context(layer.register_forward_pre_hook(remove(before, rows, length), with_kwargs=True))
            elif gone:
                stack.enter_context(layer.register_forward_pre_hook(hide(gone), with_kwargs=True))
            if hasattr(layer, "self_attn"):
                stack.enter_context(layer.self_attn.register_forward_hook(note(index, rows)))
        logits = family.model(**sample, use_cache=False).logits[0]
    return spread(logits, rows, length), attentions


def hide(columns: set[int]):
    """A hook that hides these keys from a layer."""

    def hook(module, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        mask[..., [*columns]] = torch.finfo(mask.dtype).min  # not -inf: a row with no key left must stay finite
        return args, {**kwargs, "attention_mask": mask}

    return hook


def remove(before: list[int], rows: list[int], length: int):
    """A hook that leaves a layer these of the prompt's rows, of those before, in all that it is given."""

    def shorten(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(shorten, value))
        if isinstance(value, Tensor):
            for axis in range(value.dim()):
                if value.shape[axis] == length:
                    value = value.index_select(axis, torch.tensor(rows))
        return value

    def hook(module, args, kwargs):
        hidden = args[0][:, [before.index(row) for row in rows]]
        return (hidden, *args[1:]), {key: shorten(value) for key, value in kwargs.items()}

    return hook


def spread(values: Tensor, rows: list[int], length: int) -> Tensor:
    """Rows at their places in the whole prompt, zeros between them."""
    return values.new_zeros(length, *values.shape[1:]).index_copy(0, torch.tensor(rows), values)


def kept_sets(family: Family, sample: Sample, pruner: Pruner) -> tuple[dict[int, list[int]], float]:
    """Image positions that stay from each stage's layer on, and the smallest relative margin at a cut."""
    ids = sample["input_ids"][0]
    alive = (ids == IMAGE).nonzero().flatten().tolist()
    rows = {"question": range(alive[-1] + 1, len(ids)), "last": [len(ids) - 1]}
    kept: dict[int, list[int]] = {}
    drops: Drops = {}
    smallest = math.inf
    for stage in pruner.checked_stages(LAYERS, len(alive)):
        attention = forward(family, sample, drops)[1][stage.scored_layer]
        received = attention[[*rows.get(stage.queries, alive)]].sum(0)[alive].tolist()
        stay, margin = largest(alive, received, stage.keep)
        drops[stage.layer], kept[stage.layer] = set(alive) - set(stay), stay
        alive, smallest = stay, min(smallest, margin)
    return kept, smallest


def drops_of(sample: Sample, pruner: Pruner, trace: Trace) -> Drops:
    """What a pruned prefill dropped, stage by stage."""
    alive = set((sample["input_ids"][0] == IMAGE).nonzero().flatten().tolist())
    drops: Drops = {}
    for stage in pruner.checked_stages(LAYERS, len(alive)):
        stay = set(trace.kept[stage.layer][0].tolist())
        drops[stage.layer] = alive - stay
        alive = stay
    return drops


def positions(family: Family, sample: Sample) -> Tensor | None:
    """The positions that unpruned generation gives the text decoder, prompt first; None where it counts by itself."""
    seen: list[Tensor | None] = []

    def note(module, args, kwargs):
        seen.append(kwargs.get("position_ids"))

    with family.decoder.register_forward_pre_hook(note, with_kwargs=True):
        family.answer(sample)
    return None if any(places is None for places in seen) else torch.cat(seen, -1)


def decode(family: Family, sample: Sample, drops: Drops, tokens: list[int], places: Tensor | None) -> Tensor:
    """Logits (step, vocab) with which each of these tokens would be chosen."""
    steps = []
    for token in tokens:
        here = None if places is None else places[..., : sample["input_ids"].shape[1]]
        steps.append(forward(family, sample, drops, here)[0][-1])
        sample = family.extend(sample, token)
    return torch.stack(steps)
