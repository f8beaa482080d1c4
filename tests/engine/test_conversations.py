"""Several turns over one cache: each image is ranked by its own question, on top of what earlier turns have left."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import DynamicCache, Qwen2Config

import oracles
import tiny
from vlmflow import VTW, FastV, HiMAP, PyramidDrop, Unpruned, prune

PRUNERS = [HiMAP(k1=2, r1=0.5, k2=4, r2=0.5), FastV(k=2, ratio=0.5), PyramidDrop(layers=(2, 4)), VTW(k=3)]
TURNS = {  # of two conversations, ragged in every turn
    "image, image": [([4, "image", 6], [2, "image", "image", 3]), ([3, "image", 7], [1, "image", 4])],
    "text, image": [([9], [5]), ([3, "image", 7], [1, "image", "image", 4])],
    "image, text, image": [([4, "image", 6], [7, "image", 3]), ([5], [2]), ([2, "image", 5], [3, "image", 9])],
    "one image or two in as many tokens, image": [
        ([10, "image", 27], [5, "image", "image", 7]),
        ([3, "image", 7], [4, "image", 6]),
    ],
    "image, image or text": [([4, "image", 6], [7, "image", 3]), ([3, "image", 5], [6])],
}
STEPS = 3


@cache
def build(family, attn="sdpa"):
    """A tiny model; ``windowed``: LLaVA's, whose decoder has sliding windows in every other layer."""
    if family != "windowed":
        return tiny.build(family, attn)
    small, kinds = tiny.build("llava", attn), ["sliding_attention", "full_attention"] * 3
    config = copy.deepcopy(small.model.config)
    config.text_config = Qwen2Config(
        **tiny.TEXT, num_hidden_layers=6, use_sliding_window=True, sliding_window=14, layer_types=kinds
    )
    model = type(small.model)._from_config(config, attn_implementation=attn)
    tiny.randomize(model)
    return replace(small, model=model.to(tiny.DEVICE).eval())


def turns_of(small, name):
    """The samples of each turn: ``turns[turn][conversation]``."""
    return [
        [small.sample(list(spec), seed=10 * turn + number) for number, spec in enumerate(specs)]
        for turn, specs in enumerate(TURNS[name])
    ]


def place(mask, n):
    return (mask.cumsum(1) - 1).clamp(min=0)[:, -n:]


@torch.no_grad()
def converse(small, turns, sessions):
    """Logits behind each turn and of some further tokens, and kept sets, numbered within each sample's own turn."""
    cache, mask = DynamicCache(config=small.model.config), torch.zeros(len(turns[0]), 0, dtype=torch.long)
    logits, kept = [], []
    for samples, pruner in zip(turns, sessions, strict=True):
        batch = small.collate(samples)
        mask = torch.cat([mask.to(tiny.DEVICE), batch["attention_mask"]], 1)
        length = batch["input_ids"].shape[1]
        with prune(small.model, pruner) as trace:
            how = {"attention_mask": mask, "position_ids": place(mask, length)}
            out = small.model(**{**batch, **how}, past_key_values=cache, use_cache=True)
            logits.append(out.logits[:, -1])
            padding = [length - sample["input_ids"].shape[1] for sample in samples]
            layers = trace.kept if any("pixel_values" in sample for sample in samples) else ()
            kept.append([[(row - n).tolist() for row, n in zip(layer, padding, strict=True)] for layer in layers])
    tokens = torch.tensor([[5], [7], [11]], device=tiny.DEVICE).expand(STEPS, len(turns[0]))
    with prune(small.model, sessions[-1]):
        for token in tokens:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            out = small.model(
                input_ids=token[:, None], attention_mask=mask, position_ids=place(mask, 1), past_key_values=cache
            )
            logits.append(out.logits[:, -1])
    return torch.stack(logits, 1), kept, cache


@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize("family", ["llava", "mistral3"])  # windows would count the padding between turns
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
def test_conversations_in_a_batch_are_those_alone(family, attn, pruner, name):
    """Law 4."""
    small = build(family, attn)
    turns = turns_of(small, name)
    together, kept, _ = converse(small, turns, [pruner] * len(turns))
    for number in range(2):
        alone, kept_alone, _ = converse(small, [[samples[number]] for samples in turns], [pruner] * len(turns))
        torch.testing.assert_close(together[number], alone[0], atol=1e-4, rtol=0)
        for turn, of_turn in zip(kept, kept_alone, strict=True):
            if of_turn:
                assert [layer[number] for layer in turn] == [layer[0] for layer in of_turn]


@pytest.mark.parametrize("family", ["llava", "mistral3"])  # windows would count the padding between turns
@pytest.mark.parametrize("name", ["image, image", "image, text, image"])
def test_keeping_everything_changes_no_bit(family, name):
    """Law 1."""
    small = build(family)
    turns = turns_of(small, name)
    plain = converse(small, turns, [Unpruned()] * len(turns))[0]
    for pruner in (HiMAP(k1=2, r1=0.0, k2=4, r2=0.0), PyramidDrop(layers=(2, 4), ratio=0.0)):
        assert torch.equal(converse(small, turns, [pruner] * len(turns))[0], plain)


@pytest.mark.parametrize("name", ["image, image", "text, image", "image, text, image"])
@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
@pytest.mark.parametrize("second", [None, FastV(k=1, ratio=0.3)], ids=repr)
@pytest.mark.parametrize("family", ["llava", "windowed"])
def test_every_turn_is_what_the_formulas_say(family, name, pruner, second):
    """Laws 2, 3 and 8: against the whole conversation in one pass, without a cache, with dropped keys masked.

    The last turn may be read under another session, whose pruner begins earlier.
    """
    small, slow = build(family), build(family, "eager").model
    turns = [[samples[0]] for samples in turns_of(small, name)]
    sessions = [pruner] * (len(turns) - 1) + [second or pruner]
    logits, kept, cache = converse(small, turns, sessions)

    dropped, whole, held = {}, None, [0] * 6
    for number, ((sample,), session) in enumerate(zip(turns, sessions, strict=True)):
        start = 0 if whole is None else whole["input_ids"].shape[1]
        whole = sample if whole is None else joined(whole, sample)
        image = (start + (sample["input_ids"][0] == tiny.IMAGE).nonzero().flatten()).tolist()
        left, question = image, list(range(image[-1] + 1 if image else start, whole["input_ids"].shape[1]))
        for stage in session.stages(6, len(image)) if image else ():
            attention = oracles.masked_forward(slow, whole, dropped)[1][stage.scored_layer].mean(0)
            queries = {"question": question, "image": left, "last": question[-1:], None: []}[stage.queries]
            left, _ = oracles.largest(left, attention[queries][:, left].sum(0).tolist(), stage.keep)
            dropped[stage.layer] = dropped.get(stage.layer, set()) | (set(image) - set(left))
            assert [position + start for position in kept[number][stage.layer][0]] == left
        expected = oracles.masked_forward(slow, whole, dropped)[0][-1]
        torch.testing.assert_close(logits[0, number], expected, atol=1e-4, rtol=0)
    for step, token in enumerate((5, 7, 11)):
        whole = oracles.extend(slow, whole, token)
        expected = oracles.masked_forward(slow, whole, dropped)[0][-1]
        torch.testing.assert_close(logits[0, len(turns) + step], expected, atol=1e-4, rtol=0)
    for layer in range(6):
        gone = set().union(*(positions for first, positions in dropped.items() if first <= layer))
        held[layer] = whole["input_ids"].shape[1] - len(gone)
    for layer, length in zip(cache.layers, held, strict=True):
        assert layer.keys.shape[-2] == (min(length, layer.sliding_window - 1) if layer.is_sliding else length)


def joined(first, second):
    """One prompt of two, in one row."""
    whole = {key: torch.cat([first[key], second[key]], 1) for key in ("input_ids", "attention_mask")}
    pixels = [sample["pixel_values"] for sample in (first, second) if "pixel_values" in sample]
    return whole | ({"pixel_values": torch.cat(pixels)} if pixels else {})
