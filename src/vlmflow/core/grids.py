"""How image tokens lie in their images: readers of an encoded prompt, None where they do not apply; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmflow.core.widths import Config

Grids = list[tuple[int, int]]  # rows and columns of each image's tokens


@dataclass(frozen=True)
class Tile:
    """A part of an image whose tokens form a grid, row by row.

    ``box`` is what it shows: left, top, right and bottom in shares of the image's width and height. ``first`` is the
    number of its first token among the prompt's image tokens, ``step`` how many tokens later the next row starts:
    ``columns``, or one more where a token that is no patch ends each row.
    """

    image: int
    box: tuple[float, float, float, float]
    rows: int
    columns: int
    first: int
    step: int


WHOLE = (0.0, 0.0, 1.0, 1.0)  # the box of a tile that shows all of its image


def whole_tiles(grids: Grids) -> list[Tile]:
    """The tiles of images that are one grid each."""
    tiles, first = [], 0
    for image, (rows, columns) in enumerate(grids):
        tiles.append(Tile(image, WHOLE, rows, columns, first, columns))
        first += rows * columns
    return tiles


def by_patch_grid(inputs: Mapping[str, Any], config: Config, n_image: int, n_pictures: int) -> Grids | None:
    """Of each image its own, as ``image_grid_thw`` says in patches, of which the tower merges squares."""
    side = _vision(config).optional("spatial_merge_size")
    if "image_grid_thw" not in inputs or side is None:
        return None
    return [(int(t * h) // side, int(w) // side) for t, h, w in inputs["image_grid_thw"]]


def by_size(inputs: Mapping[str, Any], config: Config, n_image: int, n_pictures: int) -> Grids | None:
    """Of each image its own, as a Pixtral tower sees it: ``image_sizes`` says in pixels."""
    patch = _vision(config).optional("patch_size")
    if "image_sizes" not in inputs or patch is None or not _is_untiled(inputs, n_pictures):
        return None
    if inputs["pixel_values"].dim() != 4:
        return None
    side = patch * (config.optional("spatial_merge_size") or 1)
    return [(int(height) // side, int(width) // side) for height, width in inputs["image_sizes"]]


def by_shape(inputs: Mapping[str, Any], config: Config, n_image: int, n_pictures: int) -> Grids | None:
    """Of each image its own, as ``spatial_shapes`` says in patches, unless an image was cut into tiles."""
    if "spatial_shapes" not in inputs or len(inputs["spatial_shapes"]) != n_pictures:
        return None
    side = config.downsample_factor
    return [(int(rows) // side, int(columns) // side) for rows, columns in inputs["spatial_shapes"]]


def as_squares(inputs: Mapping[str, Any], config: Config, n_image: int, n_pictures: int) -> Grids | None:
    """Squares of one size, unless an image was cut into tiles."""
    if not _is_untiled(inputs, n_pictures):
        return None
    side = math.isqrt(n_image // n_pictures)
    return [(side, side)] * n_pictures


READERS = (by_patch_grid, by_size, by_shape, as_squares)  # the first that fits an encoded prompt is right


def _vision(config: Config) -> Config:
    return Config(config.optional("vision_config"))


def _is_untiled(inputs: Mapping[str, Any], n_pictures: int) -> bool:
    pixels = inputs.get("pixel_values")  # some are patches in a row, which do not tell
    return pixels is not None and pixels.dim() > 3 and pixels.shape[:-3].numel() == n_pictures
