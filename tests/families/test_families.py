"""Every image-text-to-text type of the installed transformers is pruned as the laws say, or refused with its reason."""

import json
from collections.abc import Iterator

import inputs
import pytest
import references
import shrink
import torch
from inputs import NEW, Family

import tiny
from docs.make import families
from docs.make.page import put
from vlmflow import HiMAP, PyramidDrop, prune
from vlmflow.pruners import Pruner

LIMIT, EFFECT = 1e-4, 1e-2  # of logits: how far equals may be apart, and how much pruning does at least
LOOSE = {"hunyuan_vl": 3e-2, "qwen3_5_moe": 1e-3}  # whose unpruned batches are as far from their samples
PRUNERS = [HiMAP(2, 0.5, 4, 0.5), PyramidDrop((1, 3), 0.5)]

TABLE = json.loads(families.TABLE.read_text(encoding="utf-8"))
WORKS, REFUSED = TABLE["works"], TABLE["refused"]
# Unpruned they generate by the last rows alone where keys are another layer's; pruned there, by all rows that are left.
LAST_ROWS = {"gemma4@shared": 1e-5, "gemma4@shared_window": 1e-5}


pruners = pytest.mark.parametrize("pruner", PRUNERS, ids=lambda pruner: type(pruner).__name__)


def test_every_type_is_in_one_table():
    assert not WORKS.keys() & REFUSED.keys()
    assert shrink.types().keys() <= WORKS.keys() | REFUSED.keys()


def test_the_page_shows_the_tables_as_they_are():
    """``python -m docs.make.families`` writes them anew."""
    page = families.PAGE.read_text(encoding="utf-8")
    assert put(page, "families", families.families()) == page
    assert {name for name, remark in WORKS.items() if "without its vision tower" in remark} == {*inputs.STOOD_IN}


@pytest.mark.parametrize("name", REFUSED)
def test_a_type_is_refused_with_its_reason(name: str):
    if not shrink.is_installed(name):
        pytest.skip("not in this transformers, or not as it is now")
    with torch.device("meta"):
        model = shrink.build(name)
    with pytest.raises((TypeError, ValueError), match=REFUSED[name]["message"]), prune(model, PRUNERS[0]):
        pass


@pytest.fixture(scope="module", params=WORKS)
def family(request: pytest.FixtureRequest) -> Family:
    """The type of a test, built once for all its tests."""
    if not shrink.is_installed(request.param):
        pytest.skip("not in this transformers, or not as it is now")
    return inputs.build(request.param)


@pytest.fixture
def kernel(request: pytest.FixtureRequest, family: Family) -> Iterator[str]:
    """The attention kernel that a test runs; eager after it."""
    if request.param == "sdpa" and not family.decoder._supports_sdpa:
        pytest.skip("this type has no sdpa")
    family.whole.set_attn_implementation(request.param)
    yield request.param
    family.whole.set_attn_implementation("eager")


def over(*pairs: tuple[str, Pruner]):
    """Parametrize a test over kernels and the pruners that it runs on them."""
    names = [f"{kernel}-{type(pruner).__name__}" for kernel, pruner in pairs]
    return pytest.mark.parametrize(("kernel", "pruner"), pairs, ids=names, indirect=["kernel"])


@over(("eager", HiMAP(2, 0.0, 4, 0.0)), ("eager", PyramidDrop((1, 3), 0.0)), ("sdpa", HiMAP(2, 0.0, 4, 0.0)))
def test_keeping_everything_changes_no_bit(family: Family, kernel: str, pruner: Pruner):
    """Law a. Nothing is skipped when nothing is dropped: ranking, gathering and the pruned cache all run."""
    real = family.batch["attention_mask"].bool()
    expected, generated = family.unpruned(kernel)
    with prune(family.whole, pruner) as trace:
        logits, pruned = family.logits(family.batch), family.answer(family.batch)
    assert trace.image_tokens[-1] == trace.image_tokens[0]
    assert torch.equal(logits[real], expected[real])
    assert torch.equal(pruned.sequences, generated.sequences)
    for step, other in zip(pruned.logits, generated.logits, strict=True):
        torch.testing.assert_close(step, other, atol=LAST_ROWS.get(family.name, 0), rtol=0)


@pruners
def test_what_stays_is_what_attention_ranks(family: Family, pruner: Pruner):
    for sample in family.samples:
        kept, margin = references.kept_sets(family, sample, pruner)
        if margin > 1e-5 or margin == 0:  # an exact tie, of keys beyond a window, goes to the earlier
            break
    else:
        pytest.fail("every sample nearly ties")
    with prune(family.whole, pruner) as trace:
        family.logits(sample)
    assert {layer: trace.kept[layer][0].tolist() for layer in kept} == kept


@pruners
def test_a_pruned_prefill_is_the_model_without_what_was_dropped(family: Family, pruner: Pruner):
    """Law b."""
    sample = family.samples[0]
    with prune(family.whole, pruner) as trace:
        logits = family.logits(sample)[0]
    expected, _ = references.forward(family, sample, references.drops_of(sample, pruner, trace))
    text = sample["input_ids"][0] != tiny.IMAGE
    torch.testing.assert_close(logits[text], expected[text], atol=LIMIT, rtol=0)
    assert (logits[-1] - family.logits(sample)[0, -1]).abs().max() > EFFECT


@pruners
def test_cached_decoding_is_the_model_without_what_was_dropped(family: Family, pruner: Pruner):
    """Law c, of one prompt."""
    sample = family.samples[0]
    places = references.positions(family, sample)
    with prune(family.whole, pruner) as trace:
        ours = family.answer(sample)
    drops = references.drops_of(sample, pruner, trace)
    expected = references.decode(family, sample, drops, ours.sequences[0, -NEW:].tolist(), places)
    torch.testing.assert_close(torch.cat(ours.logits), expected, atol=LIMIT, rtol=0)


@over(("eager", PRUNERS[1]), ("sdpa", PRUNERS[0]))
def test_a_padded_batch_is_its_samples(family: Family, kernel: str, pruner: Pruner):
    """Law c, of two prompts of different length."""
    limit = LOOSE.get(family.name, LIMIT)
    with prune(family.whole, pruner):
        together = family.answer(family.batch).logits
        for number, sample in enumerate(family.samples):
            for step, other in zip(together, family.answer(sample).logits, strict=True):
                torch.testing.assert_close(step[number], other[0], atol=limit, rtol=0)


def test_leaving_leaves_the_model_as_it_was(family: Family):
    """Law d."""
    logits, generated = family.unpruned("eager")
    with prune(family.whole, PRUNERS[0]):
        family.answer(family.batch)
    real = family.batch["attention_mask"].bool()
    assert torch.equal(family.logits(family.batch)[real], logits[real])
    assert torch.equal(family.answer(family.batch).sequences, generated.sequences)
