"""The tiny models behave as models do, and the oracles agree with what is known without them."""

import math
from dataclasses import dataclass

import pytest
import torch

from oracles import (
    drops,
    extend,
    generation_positions,
    kept_sets,
    largest,
    masked_forward,
    reference_generate,
    segments,
)
from tiny import FAMILIES, IMAGE, build

families = pytest.mark.parametrize("name", FAMILIES)
MARGIN = 1e-4  # far above what float32 can mix up


@dataclass(frozen=True)
class HiMAP:
    k1: int = 2
    r1: float = 0.5
    k2: int = 4
    r2: float = 0.75


@dataclass(frozen=True)
class FastV:
    k: int = 2
    ratio: float = 0.5


@dataclass(frozen=True)
class VTW:
    k: int = 3


@dataclass(frozen=True)
class PyramidDrop:
    layers: tuple[int, ...] = (1, 3, 5)
    ratio: float = 0.5


@dataclass(frozen=True)
class Random:
    k: int = 2
    ratio: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Uniform:
    k: int = 2
    ratio: float = 0.5


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def greedy(model, inputs, new_tokens=4):
    out = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, -new_tokens:], torch.stack(out.logits, 1)


# -- tiny models


@families
def test_a_padded_batch_equals_its_samples(name):
    last = {}
    for attn in ("sdpa", "eager"):
        tiny = build(name, attn)
        samples = [*tiny.samples, tiny.sample([9], seed=9)]  # every family takes a text among images
        batch = tiny.collate(samples)
        assert not bool(batch["attention_mask"].all())
        last[attn] = tiny.model(**batch).logits[:, -1]
        tokens, logits = greedy(tiny.model, batch)
        assert int(tokens.max()) < IMAGE
        for i, sample in enumerate(samples):
            assert torch.allclose(tiny.model(**sample).logits[0, -1], last[attn][i], atol=1e-4, rtol=0)
            own_tokens, own_logits = greedy(tiny.model, sample)
            assert torch.equal(own_tokens[0], tokens[i])
            assert torch.allclose(own_logits[0], logits[i], atol=1e-4, rtol=0)
    assert torch.allclose(last["sdpa"], last["eager"], atol=1e-4, rtol=0)


@families
def test_attention_is_far_from_uniform_and_rankings_have_margins(name):
    tiny = build(name, "eager")
    assert len(tiny.model.get_decoder().layers) == 6
    assert len({s["input_ids"].shape[1] for s in tiny.samples}) > 1
    for sample in tiny.samples:
        where = segments(tiny.model, sample)
        if not where["image"]:
            continue
        attentions = masked_forward(tiny.model, sample, {})[1]
        largest_share = torch.stack([a[:, -1].max(-1).values.mean() for a in attentions]).mean()
        assert largest_share > 4 / sample["input_ids"].shape[1]
        for pruner in (HiMAP(), FastV(), PyramidDrop()):
            assert kept_sets(pruner, tiny.model, sample)[1] > MARGIN


@pytest.mark.parametrize("name", [n for n in FAMILIES if "video" in build(n).drawers])
def test_video_tokens_are_image_tokens(name):
    tiny = build(name, "eager")
    sample = tiny.sample([4, "image", 3, "video", 2], seed=4)  # text shorter than the video
    where = segments(tiny.model, sample)
    assert len({int(sample["input_ids"][0, p]) for p in where["image"]}) == 2
    tokens, logits = reference_generate(tiny.model, sample, None, 3)
    expected_tokens, expected_logits = greedy(tiny.model, sample, 3)
    assert tokens == expected_tokens[0].tolist()
    assert torch.allclose(logits, expected_logits[0], atol=1e-4, rtol=0)


def test_other_depths_can_be_built():
    assert len(build("gemma3", layers=8).model.get_decoder().layers) == 8
    assert build("llava") is build("llava", "sdpa", layers=6)


# -- masking


@families
def test_no_drop_is_the_plain_forward_bit_for_bit(name):
    tiny = build(name, "eager")
    for sample in tiny.samples:
        logits, attentions = masked_forward(tiny.model, sample, {})
        assert torch.equal(logits, tiny.model(**sample, use_cache=False).logits[0])
        assert torch.equal(logits, masked_forward(tiny.model, sample, {2: set()})[0])
        assert all(a.shape[1:] == (len(logits), len(logits)) for a in attentions)


@families
def test_masking_renormalises_from_its_layer_on(name):
    tiny = build(name, "eager")
    sample = tiny.samples[1]
    image = segments(tiny.model, sample)["image"]
    first, second = set(image[::2]), set(image[:5])
    _, before = masked_forward(tiny.model, sample, {})
    logits, after = masked_forward(tiny.model, sample, {2: first, 4: second})
    assert bool(logits.isfinite().all())
    rest = [p for p in range(len(logits)) if p not in first]
    for layer in (0, 1):
        assert torch.equal(before[layer], after[layer])
    expected = before[2][:, rest][:, :, rest]
    expected = expected / expected.sum(-1, keepdim=True)
    assert torch.allclose(after[2][:, rest][:, :, rest], expected, atol=1e-6, rtol=0)
    for layer in range(2, 6):
        hidden = first | second if layer >= 4 else first
        rows = [p for p in range(len(logits)) if p not in hidden]
        assert float(after[layer][:, rows][:, :, sorted(hidden)].max()) == 0
        assert torch.allclose(after[layer].sum(-1), torch.ones(()), atol=1e-5, rtol=0)


def test_positions_can_be_given():
    tiny = build("llava", "eager")
    sample = tiny.samples[0]
    places = torch.arange(sample["input_ids"].shape[1])[None]
    plain = masked_forward(tiny.model, sample, {})[0]
    assert torch.equal(masked_forward(tiny.model, sample, {}, places)[0], plain)
    assert float((masked_forward(tiny.model, sample, {}, 2 * places)[0] - plain).abs().max()) > 1e-2


def llama_without(model, sample, kept):
    """Run a Llama written here that removes dropped tokens: logits; each layer's positions and attention."""
    seen = {}

    def note(module, args, kwargs):
        seen["embeds"] = kwargs["inputs_embeds"][0]

    decoder, image = model.get_decoder(), set(segments(model, sample)["image"])
    with decoder.register_forward_pre_hook(note, with_kwargs=True):
        model(**sample)
    hidden, alive = seen["embeds"], list(range(len(seen["embeds"])))
    dim, theta = decoder.config.head_dim, decoder.config.rope_parameters["rope_theta"]
    angle = torch.arange(len(alive))[:, None] * theta ** (-torch.arange(0, dim, 2) / dim)
    turn = torch.polar(torch.ones(()), angle)

    def heads(x, turned):
        x = x.view(len(x), -1, dim).transpose(0, 1)
        if turned:  # the two halves of a head are the real and imaginary parts
            pairs = torch.complex(*x.chunk(2, -1)) * turn[alive]
            x = torch.cat([pairs.real, pairs.imag], -1)
        return x.repeat_interleave(decoder.config.num_attention_heads // len(x), 0)

    attentions = []
    for index, layer in enumerate(decoder.layers):
        if index in kept:
            stay = [i for i, p in enumerate(alive) if p not in image or p in kept[index]]
            hidden, alive = hidden[stay], [alive[i] for i in stay]
        own, x = layer.self_attn, layer.input_layernorm(hidden)
        scores = heads(own.q_proj(x), True) @ heads(own.k_proj(x), True).mT / math.sqrt(dim)
        weights = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf).softmax(-1)
        mixed = (weights @ heads(own.v_proj(x), False)).transpose(0, 1).reshape(len(alive), -1)
        hidden = hidden + own.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        attentions.append((alive, weights))
    return model.lm_head(decoder.norm(hidden)), attentions


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_masked_key_is_a_removed_token(index):
    tiny = build("llava", "eager")
    model, sample = tiny.model, tiny.samples[index]
    where = segments(model, sample)
    kept, margin = kept_sets(HiMAP(), model, sample)
    assert margin > MARGIN
    logits, attentions = masked_forward(model, sample, drops(model, sample, kept))
    removed_logits, removed = llama_without(model, sample, kept)
    for (alive, weights), full in zip(removed, attentions, strict=True):
        assert torch.allclose(full[:, alive][:, :, alive], weights, atol=1e-5, rtol=0)
    alive = removed[-1][0]
    assert torch.allclose(logits[alive], removed_logits, atol=1e-4, rtol=0)

    # the kept sets themselves, ranked by the attentions of the forward that removes
    def top(layer, queries, keep):
        alive, weights = removed[layer]
        rows = [alive.index(p) for p in queries]
        score = {p: float(weights.mean(0)[rows, alive.index(p)].sum()) for p in alive if p in where["image"]}
        return sorted(sorted(score, key=lambda p: -score[p])[:keep])

    n = len(where["image"])
    assert kept[2] == top(1, where["instruction"], n // 2)
    assert kept[4] == top(3, kept[2], round(n // 2 / 4))
    fastv = kept_sets(FastV(ratio=0.8), model, sample)[0]
    assert fastv == {2: top(1, where["instruction"][-1:], n // 5)}


def test_pyramid_drop_ranks_by_the_layer_about_to_run():
    tiny = build("llava", "eager")
    model, sample = tiny.model, tiny.samples[1]
    image = segments(model, sample)["image"]
    kept, margin = kept_sets(PyramidDrop((2, 5), 0.6), model, sample)
    assert margin > MARGIN
    assert {layer: len(stay) for layer, stay in kept.items()} == {2: 20, 5: 8}  # of 50: int(20.0), int(8.0)
    alive, weights = llama_without(model, sample, {2: kept[2]})[1][5]
    score = {p: float(weights[:, -1, alive.index(p)].mean()) for p in alive if p in image}
    assert kept[5] == sorted(sorted(score, key=lambda p: -score[p])[:8])


# -- what is kept


def test_segments():
    tiny = build("llava")
    assert segments(tiny.model, tiny.sample([3, "image", 2, "image", 4])) == {
        "system": [0, 1, 2],
        "image": [*range(3, 28), *range(30, 55)],
        "instruction": [55, 56, 57, 58],
    }
    assert segments(tiny.model, tiny.sample([3])) == {"system": [0, 1, 2], "image": [], "instruction": []}


def test_equals_go_to_the_earlier_token():
    assert largest([7, 8, 9, 11], [0.5, 1.0, 0.5, 0.5], 2) == ([7, 8], 0.0)
    assert largest([7, 8, 9], [0.2, 0.8, 0.4], 2) == ([8, 9], 0.5)
    assert largest([7, 8], [0.2, 0.8], 2) == ([7, 8], math.inf)


def test_methods_that_do_not_look():
    tiny = build("llava", "eager")
    sample = tiny.sample([3, "image", 4])
    assert kept_sets(VTW(), tiny.model, sample)[0] == {3: []}
    assert kept_sets(Uniform(k=1, ratio=0.8), tiny.model, sample)[0] == {1: [5, 10, 15, 20, 25]}
    draws = {seed: kept_sets(Random(seed=seed), tiny.model, sample)[0][2] for seed in (0, 1)}
    assert len(draws[0]) == len(draws[1]) == 12
    assert draws[0] != draws[1]
    assert draws[0] == kept_sets(Random(), tiny.model, sample)[0][2]


@pytest.mark.parametrize("pruner", [HiMAP(), FastV(), VTW(), PyramidDrop(), Random(), Uniform()])
def test_a_text_keeps_nothing_and_drops_nothing(pruner):
    tiny = build("llava", "eager")
    sample = tiny.samples[3]
    kept, margin = kept_sets(pruner, tiny.model, sample)
    assert margin == math.inf
    assert set(map(len, kept.values())) == {0}
    assert drops(tiny.model, sample, kept) == {layer: set() for layer in kept}


# -- generation


@families
def test_the_reference_generates_what_the_model_does(name):
    tiny = build(name, "eager")
    for sample in tiny.samples:
        tokens, logits = reference_generate(tiny.model, sample, None, 4)
        expected_tokens, expected_logits = greedy(tiny.model, sample)
        assert tokens == expected_tokens[0].tolist()
        assert torch.allclose(logits, expected_logits[0], atol=1e-4, rtol=0)


@families
def test_the_reference_settles_the_kept_sets_on_the_prompt(name):
    tiny = build(name, "eager")
    sample = tiny.samples[0]
    tokens, logits = reference_generate(tiny.model, sample, HiMAP(), 3)
    dropped = drops(tiny.model, sample, kept_sets(HiMAP(), tiny.model, sample)[0])
    places = generation_positions(tiny.model, sample, 3)
    longer = extend(tiny.model, extend(tiny.model, sample, tokens[0]), tokens[1])
    length = longer["input_ids"].shape[1]
    whole = masked_forward(tiny.model, longer, dropped, None if places is None else places[..., :length])[0]
    assert torch.allclose(whole[-3:], logits, atol=1e-4, rtol=0)  # later tokens change nothing before them
    plain = reference_generate(tiny.model, sample, None, 3)[1]
    assert float((plain - logits).abs().max()) > 1e-2
