"""Segments, read from ids."""

import pytest
import torch

import oracles
import tiny
from vlmflow import Layout

IMAGE = 9


def read(*rows, mask=None):
    return Layout.read(torch.tensor(rows), [IMAGE], None if mask is None else torch.tensor(mask))


def positions(layout, sample=0):
    return {name: layout.positions(name)[sample].tolist() for name in ("system", "image", "instruction")}


def test_one_image():
    assert positions(read([1, 2, 9, 9, 3, 4])) == {"system": [0, 1], "image": [2, 3], "instruction": [4, 5]}


def test_several_images_and_text_between():
    layout = read([1, 9, 2, 9, 9, 3])
    assert positions(layout) == {"system": [0], "image": [1, 3, 4], "instruction": [2, 5]}
    assert layout.question[0].tolist() == [False] * 5 + [True]


def test_image_first_and_image_last():
    layout = read([9, 9, 1, 9])
    assert positions(layout) == {"system": [], "image": [0, 1, 3], "instruction": [2]}
    assert not layout.question.any()


def test_left_padding_and_a_text_only_sample():
    layout = read([0, 0, 1, 9, 2], [0, 3, 4, 5, 6], mask=[[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    assert positions(layout, 0) == {"system": [2], "image": [3], "instruction": [4]}
    assert positions(layout, 1) == {"system": [1, 2, 3, 4], "image": [], "instruction": []}
    assert layout.padding.tolist() == [[True, True, False, False, False], [True, False, False, False, False]]


def test_every_position_has_one_segment():
    for family in tiny.FAMILIES:
        small = tiny.build(family)
        batch = small.collate(small.samples)
        layout = Layout.read(batch["input_ids"], [tiny.IMAGE, tiny.VIDEO], batch["attention_mask"])
        total = sum(flag.int() for flag in (layout.system, layout.image, layout.instruction, layout.padding))
        assert (total == 1).all()
        assert not (layout.question & ~layout.instruction).any()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_agrees_with_plain_loops(family):
    small = tiny.build(family)
    for sample in small.samples:
        layout = Layout.read(sample["input_ids"], [tiny.IMAGE, tiny.VIDEO])
        expected = oracles.segments(small.model, sample)
        assert positions(layout)["image"] == expected["image"]
        assert positions(layout)["system"] == expected["system"]
        assert layout.question[0].nonzero().flatten().tolist() == expected["instruction"]


def test_unknown_segment():
    with pytest.raises(ValueError, match="system, image, instruction, got 'visual'"):
        read([1, 9]).positions("visual")
