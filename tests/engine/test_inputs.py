"""Inputs in other forms, and methods that ask for what is not there: ties, growing counts, ready-made masks."""

from dataclasses import dataclass

import pytest
import torch

import tiny
from vlmflow import HiMAP, PyramidDrop, prune
from vlmflow.core.attention import causal_mask
from vlmflow.pruners import Pruner, Stage

HIMAP = HiMAP(k1=2, r1=0.5, k2=4, r2=0.5)


@pytest.fixture(scope="module")
def llava():
    return tiny.build("llava")


@dataclass(frozen=True)
class Counts(Pruner):
    """Keeps so many before these layers; all image tokens are equal to it."""

    drops: tuple[tuple[int, int], ...] = ((2, 3),)

    def stages(self, n_layers, n_image):
        return tuple(Stage(layer, keep) for layer, keep in self.drops)

    def score(self, view):
        return torch.zeros(view.valid.shape)


def first(trace, count: int) -> list[list[int]]:
    """The places of each sample's first image tokens."""
    return [row.nonzero().flatten()[:count].tolist() for row in trace.layout.image]


def test_of_equals_the_earlier_tokens_stay(llava):
    batch = llava.collate(llava.samples)
    with prune(llava.model, Counts()) as trace, torch.no_grad():
        llava.model(**batch)
    assert len({count for count in trace.image_tokens[0] if count}) > 1
    assert [places.tolist() for places in trace.kept[2]] == first(trace, 3)


@pytest.mark.parametrize(("drops", "left"), [(((2, 2), (4, 5)), (2, 2)), (((2, 7), (4, 10_000)), (7, 7))])
def test_a_stage_that_asks_for_more_than_is_left_drops_nothing(llava, drops, left):
    batch = llava.collate(llava.samples)
    with prune(llava.model, Counts(drops)) as trace, torch.no_grad():
        llava.model(**batch)
    for layer, count in zip((2, 4), left, strict=True):
        assert [places.tolist() for places in trace.kept[layer]] == first(trace, count)
    assert trace.image_tokens[5] == tuple(min(left[1], n) for n in trace.image_tokens[0])


def test_a_count_above_all_changes_no_bit(llava):
    batch = llava.collate(llava.samples)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = llava.model(**batch).logits
        with prune(llava.model, Counts(((2, 10_000),))):
            assert torch.equal(llava.model(**batch).logits[real], expected[real])


@pytest.mark.parametrize("form", ["boolean", "additive", "by layer type"])
@pytest.mark.parametrize("pruner", [HIMAP, PyramidDrop((2, 4))], ids=repr)
def test_masks_of_four_dimensions_say_what_is_padding(pruner, form):
    """As a model makes them of the padding, ready-made: what stays and what comes out is the same."""
    small = tiny.build("internvl" if form == "by layer type" else "llava")
    batch = small.collate(small.samples)
    padding = batch["attention_mask"].bool()
    visible = causal_mask(padding.shape[1], padding)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    given = {
        "boolean": visible,
        "additive": additive,
        "by layer type": {"sliding_attention": visible.triu(3 - visible.shape[-1]).tril(-2), "full_attention": visible},
    }[form]
    found = []
    for mask in (batch["attention_mask"], given):
        position_ids = (padding.cumsum(1) - 1).clamp(min=0)
        with prune(small.model, pruner) as trace, torch.no_grad():
            logits = small.model(**{**batch, "attention_mask": mask, "position_ids": position_ids}).logits
        found.append((logits[padding], [places.tolist() for places in trace.kept[5]]))
    assert found[0][1] == found[1][1]
    assert (found[0][0] - found[1][0]).abs().max() < 1e-4
