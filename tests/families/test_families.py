"""Every image-text-to-text type of the installed transformers is pruned as the laws say, or refused with its reason."""

import json
from pathlib import Path

import pytest
import torch

import inputs
import references
import shrink
import tiny
from inputs import Family
from vlmflow import HiMAP, PyramidDrop, prune
from vlmflow.pruners import Pruner

NEW = 4
LIMIT, EFFECT = 1e-4, 1e-2  # of logits: how far two ways to the same may differ, and how much pruning changes at least
KEEP_ALL = [HiMAP(2, 0.0, 4, 0.0), PyramidDrop((1, 3), 0.0)]
PRUNERS = [HiMAP(2, 0.5, 4, 0.5), PyramidDrop((1, 3), 0.5)]
KERNELS = ["eager", "sdpa"]
TABLE = json.loads((Path(__file__).parents[2] / "docs" / "families.json").read_text())
WORKS, REFUSED = TABLE["works"], TABLE["refused"]
PENDING: set[str] = set()


def test_every_type_is_in_one_table():
    assert not WORKS.keys() & REFUSED.keys()
    assert shrink.types().keys() <= WORKS.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_a_type_is_refused_with_its_reason(name: str):
    if not shrink.is_installed(name):
        pytest.skip("not in this transformers")
    with pytest.raises((TypeError, ValueError), match=REFUSED[name]["message"]), prune(shrink.build(name), PRUNERS[0]):
        pass


@pytest.fixture(scope="module", params=WORKS)
def family(request: pytest.FixtureRequest) -> Family:
    """The type of a test, built once for all its tests."""
    if not shrink.is_installed(request.param):
        pytest.skip("not in this transformers")
    return inputs.build(request.param)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, family: Family) -> str:
    """The attention kernel that a test runs."""
    family.whole.set_attn_implementation(request.param)
    yield request.param
    family.whole.set_attn_implementation("eager")


pruners = pytest.mark.parametrize("pruner", PRUNERS, ids=repr)


def answer(family: Family, sample: tiny.Sample):
    return family.model.generate(
        **sample,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def logits(family: Family, sample: tiny.Sample) -> torch.Tensor:
    with torch.no_grad():
        return family.model(**sample).logits


@pytest.mark.parametrize("pruner", KEEP_ALL, ids=repr)
def test_keeping_everything_changes_no_bit(family: Family, kernel: str, pruner: Pruner):
    real = family.batch["attention_mask"].bool()
    expected, generated = logits(family, family.batch), answer(family, family.batch)
    with prune(family.whole, pruner) as trace:
        ours, pruned = logits(family, family.batch), answer(family, family.batch)
    assert trace.image_tokens[-1] == trace.image_tokens[0]
    assert torch.equal(ours[real], expected[real])
    assert torch.equal(pruned.sequences, generated.sequences)
    assert all(torch.equal(one, other) for one, other in zip(pruned.logits, generated.logits, strict=True))


@pruners
def test_what_stays_is_what_attention_ranks(family: Family, pruner: Pruner):
    for sample in family.samples:
        kept, margin = references.kept_sets(family, sample, pruner)
        assert margin > 1e-5
        with prune(family.whole, pruner) as trace:
            logits(family, sample)
        assert {layer: trace.kept[layer][0].tolist() for layer in kept} == kept


@pruners
def test_a_pruned_prefill_is_the_model_without_what_was_dropped(family: Family, pruner: Pruner):
    for sample in family.samples:
        with prune(family.whole, pruner) as trace:
            ours = logits(family, sample)[0]
        drops = references.drops_of(sample, pruner, trace)
        expected, _ = references.forward(family, sample, drops)
        text = sample["input_ids"][0] != tiny.IMAGE
        torch.testing.assert_close(ours[text], expected[text], atol=LIMIT, rtol=0)
        assert (logits(family, sample)[0] - ours)[-1].abs().max() > EFFECT


@pruners
def test_cached_decoding_is_the_model_without_what_was_dropped(family: Family, pruner: Pruner):
    sample = family.samples[0]
    places = references.positions(family, lambda: answer(family, sample))
    with prune(family.whole, pruner) as trace:
        ours = answer(family, sample)
    drops = references.drops_of(sample, pruner, trace)
    expected = references.decode(family, sample, drops, ours.sequences[0, -NEW:].tolist(), places)
    torch.testing.assert_close(torch.cat(ours.logits), expected, atol=LIMIT, rtol=0)


@pruners
def test_a_padded_batch_is_its_samples(family: Family, kernel: str, pruner: Pruner):
    with prune(family.whole, pruner):
        together = answer(family, family.batch).logits
        for number, sample in enumerate(family.samples):
            alone = answer(family, sample).logits
            for step, other in zip(together, alone, strict=True):
                torch.testing.assert_close(step[number], other[0], atol=LIMIT, rtol=0)


def test_leaving_leaves_the_model_as_it_was(family: Family):
    before = answer(family, family.batch)
    with prune(family.whole, PRUNERS[0]):
        answer(family, family.batch)
    after = answer(family, family.batch)
    assert all(torch.equal(one, other) for one, other in zip(after.logits, before.logits, strict=True))
