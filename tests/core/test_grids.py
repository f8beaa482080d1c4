"""How image tokens lie in their images, by what processors say of them."""

from types import SimpleNamespace

import pytest
import torch

from vlmflow.core.grids import Grids, as_squares, by_patch_grid, by_shape, by_size
from vlmflow.core.widths import Config


def config(vision: dict[str, int] | None = None, **fields: int) -> Config:
    """A config, and these fields of its tower."""
    return Config(SimpleNamespace(vision_config=SimpleNamespace(**vision or {}), **fields))


@pytest.mark.parametrize(
    ("n_pictures", "grids"),
    [(2, [(2, 3), (1, 5)]), (1, None)],  # one image that became two tiles
)
def test_shapes_are_those_of_whole_images(n_pictures: int, grids: Grids | None):
    inputs = {"spatial_shapes": torch.tensor([[4, 6], [2, 10]])}
    assert by_shape(inputs, config(downsample_factor=2), 11, n_pictures) == grids


MERGED, PATCHED = {"spatial_merge_size": 2}, {"patch_size": 8}


@pytest.mark.parametrize(
    ("read", "inputs", "tower", "fields", "grids"),
    [
        (by_patch_grid, {"image_grid_thw": [[1, 8, 12], [2, 4, 6]]}, MERGED, {}, [(4, 6), (4, 3)]),
        (by_size, {"image_sizes": [[32, 96], [64, 32]]}, PATCHED, {}, [(4, 12), (8, 4)]),
        (by_size, {"image_sizes": [[32, 96], [64, 32]]}, PATCHED, MERGED, [(2, 6), (4, 2)]),
        (by_size, {"image_sizes": [[32, 96]]}, PATCHED, {}, None),  # two pictures, or tiles
        (as_squares, {}, {}, {}, [(5, 5), (5, 5)]),
    ],
)
def test_rows_come_before_columns(read, inputs, tower, fields, grids):
    """Of two pictures, in tokens: patches that the tower or the projector merges are one."""
    pixels = {"pixel_values": torch.zeros(len(inputs.get("image_sizes", (1, 2))), 3, 96, 96)}
    assert read(pixels | inputs, config(tower, **fields), 50, 2) == grids


@pytest.mark.parametrize(
    ("read", "inputs"),
    [
        (by_patch_grid, {"image_grid_thw": torch.tensor([[1, 8, 8]])}),  # Kimi's tower names its merging otherwise
        (by_size, {"image_sizes": [[32, 32]], "pixel_values": torch.zeros(1, 3, 32, 32)}),  # Emu3 has no tower
        (as_squares, {"pixel_values": torch.zeros(1, 144, 48)}),  # patches of an image of any shape
        (as_squares, {"pixel_values": torch.zeros(1, 5, 3, 32, 32)}),  # tiles
        (as_squares, {}),
    ],
)
def test_what_cannot_be_told_is_not_guessed(read, inputs):
    assert read(inputs, config(), 16, 1) is None


def test_a_family_without_a_tower_in_its_config_has_no_grid_to_read():
    assert by_patch_grid({"image_grid_thw": torch.tensor([[1, 8, 8]])}, Config(SimpleNamespace()), 16, 1) is None
