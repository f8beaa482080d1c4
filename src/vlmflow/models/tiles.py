"""Where image tokens lie in images that a model sees in parts: squeezed into a small picture, and cut into tiles."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from vlmflow.core.grids import WHOLE, Tile, whole_tiles
from vlmflow.models.grids import patch_grids
from vlmflow.models.vlm import VLM, Question
from vlmflow.records.schema import SeenImages

PACKING = ("llava_next", "llava_next_video", "llava_onevision")  # join an image's tiles to one grid, with ends of rows
LEAST = 0.7  # correlation of tiles with the parts of an image that they are taken for
_SIDE = 16  # pixels to which a tile is shrunk before it is compared


def seen_by(vlm: VLM, question: Question, inputs: dict[str, torch.Tensor], positions: Sequence[int]) -> SeenImages:
    """How the images of an encoded question became the image tokens at these positions of its prompt."""
    grids = patch_grids(inputs, vlm.model.config, len(positions), len(question.images))
    tiles = whole_tiles(grids) if grids is not None else _parts(vlm.model, inputs, question.images, len(positions))
    return SeenImages([image.size for image in question.images], list(positions), grids, tiles)


def _parts(
    model: Any, inputs: dict[str, torch.Tensor], images: Sequence[Image.Image], n_image: int
) -> list[Tile] | None:
    """The grids of images that are not one grid each; the small picture of a whole image is one of them."""
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.dim() < 4 or not images:
        return None
    if model.config.model_type in PACKING:
        return _packed(model.model, inputs, n_image)
    tiles = pixels.flatten(0, -4).float().mean(1, keepdim=True)
    return _cut(torch.nn.functional.adaptive_avg_pool2d(tiles, _SIDE).squeeze(1).cpu().numpy(), images, n_image)


def _packed(model: Any, inputs: dict[str, torch.Tensor], n_image: int) -> list[Tile] | None:
    """As LLaVA-NeXT packs them: markers in the place of features show what becomes of each."""
    config, sizes = model.config, inputs["image_sizes"].tolist()
    whole, patch = config.vision_config.image_size, config.vision_config.patch_size
    side, small, tile, end = whole // patch, 0.0, 1.0, 2.0
    cuts = len(sizes) == 1 or "batch_num_images" not in inputs  # LLaVA-OneVision cuts no image among several
    markers = []
    for size in sizes:
        count = image_size_to_num_patches(size, config.image_grid_pinpoints, whole) if cuts else 1
        markers.append(torch.full((count, side * side, 1), tile))
        markers[-1][0] = small
    wanted = inspect.signature(model.pack_image_features).parameters
    settings = {name: getattr(config, name) for name in wanted if hasattr(config, name)}
    packed, _ = model.pack_image_features(
        image_features=markers, image_sizes=sizes, image_newline=torch.tensor([end]), **settings
    )
    tiles, first = [], 0
    for image, marked in enumerate(packed):
        tiles.append(Tile(image, WHOLE, side, side, first, side))
        if (joined := int((marked == tile).sum())) > 0:
            rows = int((marked == end).sum())
            tiles.append(Tile(image, WHOLE, rows, joined // rows, first + side * side, joined // rows + 1))
        first += len(marked)
    return tiles if first == n_image else None


def _cut(tiles: np.ndarray, images: Sequence[Image.Image], n_image: int) -> list[Tile] | None:
    """Tiles of one size, in the order of their pixels (tile, row, column), which show where each of them is from."""
    side = math.isqrt(n_image // len(tiles))
    if side * side * len(tiles) != n_image:
        return None
    greys = [Image.fromarray(np.asarray(image.convert("RGB"), np.float32).mean(2)) for image in images]
    for grey in greys:
        grey.thumbnail((512, 512))

    @cache
    def placed(image: int, first: int) -> tuple[float, list[Tile]] | None:
        """The best way to give all tiles from the first on to the images from this one on, and how good it is."""
        if image == len(images):
            return (0.0, []) if first == len(tiles) else None
        best = None
        for last in range(first + 1, len(tiles) + 1):
            if (others := placed(image + 1, last)) is None:
                continue
            for boxes in _arrangements(last - first):
                if (found := _agreement(tiles[first:last], boxes, greys[image])) < LEAST:
                    continue
                worth = found * (last - first) + others[0]
                if best is None or worth > best[0]:
                    grids = [Tile(image, box, side, side, n * side**2, side) for n, box in enumerate(boxes, first)]
                    best = worth, grids + others[1]
        return best

    return found[1] if (found := placed(0, 0)) else None


def _arrangements(count: int) -> Iterator[list[tuple[float, float, float, float]]]:
    """Ways to cut an image: into rows and columns of equal tiles, its whole behind them, before them or nowhere."""
    for behind, before in ((1, 0), (0, 1), (0, 0)):
        parts = count - behind - before
        for down in (rows for rows in range(1, parts + 1) if parts % rows == 0):
            across = parts // down
            boxes = [
                (column / across, row / down, (column + 1) / across, (row + 1) / down)
                for row in range(down)
                for column in range(across)
            ]
            yield [WHOLE] * before + boxes + [WHOLE] * behind


def _agreement(tiles: np.ndarray, boxes: Sequence[tuple[float, float, float, float]], grey: Image.Image) -> float:
    """The correlation of tiles with what is in these boxes of an image; 1 where both are of one colour."""
    size = np.array([grey.width, grey.height] * 2)
    parts = [grey.resize((_SIDE, _SIDE), Image.Resampling.BOX, tuple(size * box)) for box in boxes]
    seen, shown = tiles.ravel(), np.stack([np.asarray(part) for part in parts]).ravel()
    if min(seen.std(), shown.std()) < 1e-3:
        return float(max(seen.std(), shown.std()) < 1e-2)
    return float(np.corrcoef(seen, shown)[0, 1])
