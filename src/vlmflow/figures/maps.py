"""Pictures of image tokens: which of them a method kept, and how much flows from each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from vlmflow.core.grids import WHOLE, Tile
from vlmflow.figures.style import save, save_both

_WIDTH = 2.2  # inches that one picture takes
_COLUMNS = 4
_CELL = 16  # pixels that the smallest patch takes at least
_LEAST = 256  # pixels that a picture takes at least
_FADED = 0.82  # how far a dropped patch goes towards white
_FULL = np.array([0.62, 0.10, 0.0])  # the colour of the patch that matters most; dark, so that it is seen in print


def kept_patches(
    path: Path,
    images: Sequence[Image.Image],
    tiles: Sequence[Tile],
    methods: Mapping[str, Mapping[int, Sequence[int]]],
    title: str,
) -> None:
    """Draw the images, then what each method kept of them at each stage, dropped patches faded.

    ``tiles`` say where the images' tokens lie; ``methods`` maps a label to its stages: layer -> numbers of the image
    tokens that stayed.
    """
    strip, cells = _side_by_side(images, tiles)
    panels = [("what the model sees", f"{len(cells)} patches", strip)]
    for label, stages in methods.items():
        for layer, kept in stages.items():
            panels.append((label, f"from layer {layer} on: {len(kept)} tokens", _fade(strip, cells, kept)))
    n_rows = -(-len(panels) // _COLUMNS)
    height = _WIDTH * strip.shape[0] / strip.shape[1] + 0.45
    figure = Figure(figsize=(_WIDTH * _COLUMNS, height * n_rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=11, wrap=True)
    axes = figure.subplots(n_rows, _COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (label, caption, picture) in zip(axes, panels, strict=False):
        axis.imshow(picture)
        axis.set_title(f"{label}\n{caption}", fontsize=8, loc="left")
    save(figure, path)


def flow_maps(
    stem: Path,
    images: Sequence[Image.Image],
    tiles: Sequence[Tile],
    layers: Sequence[int],
    flows: Mapping[str, np.ndarray],
    title: str,
) -> None:
    """Draw over the images, layer by layer, how important the flow from each image token is.

    ``flows`` maps a label to (layer, image token). Each picture has its own scale, from grey for nothing to full colour
    for its largest; the share above it is that of the layer in this flow over all layers shown.
    """
    strip, cells = _side_by_side(images, tiles)
    grey = (np.asarray(Image.fromarray(strip).convert("L"), float) / 2 + 127)[..., None].repeat(3, 2) / 255
    bands = -(-len(layers) // 8)
    columns = -(-len(layers) // bands)
    height = 1.5 * strip.shape[0] / strip.shape[1] + 0.35
    figure = Figure(figsize=(1.5 * columns, height * bands * len(flows) + 0.6), layout="constrained")
    axes = figure.subplots(bands * len(flows), columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for row, (label, importance) in enumerate(flows.items()):
        total = importance.sum()
        for number, layer in enumerate(layers):
            axis = axes[number // columns * len(flows) + row, number % columns]
            heat = np.zeros((*strip.shape[:2], 1))
            for token, cell in cells.items():
                heat[cell] = importance[number, token] / (importance[number].max() or 1.0)
            axis.imshow(_FULL * heat + grey * (1 - heat))
            share = f"{importance[number].sum() / total:.0%}" if total > 0 else "none"
            above = "" if number % columns else f"{label}\n"
            axis.set_title(f"{above}layer {layer}: {share}", fontsize=8, loc="left")
    figure.suptitle(title, fontsize=10, wrap=True)
    save_both(figure, stem)


def _side_by_side(
    images: Sequence[Image.Image], tiles: Sequence[Tile]
) -> tuple[np.ndarray, dict[int, tuple[slice, slice]]]:
    """All images at one height in a row, and the pixels in it of each image token that is a patch.

    An image that was cut into tiles stands behind its small picture, with a white line between one tile and the next.
    """
    views: list[list[Tile]] = []
    for tile in sorted(tiles, key=lambda tile: (tile.image, tile.box != WHOLE)):
        if tile.box != WHOLE and views and views[-1][0].box != WHOLE and views[-1][0].image == tile.image:
            views[-1].append(tile)
        else:
            views.append([tile])
    tall = [sum(tile.rows for tile in view if tile.box[0] == 0) for view in views]
    wide = [sum(tile.columns for tile in view if tile.box[1] == 0) for view in views]
    side, gap = max(_CELL * max(tall), _LEAST), _CELL // 2
    pictures, cells, left = [], {}, 0
    for view, rows, columns in zip(views, tall, wide, strict=True):
        width = round(side * columns / rows)
        picture = np.array(images[view[0].image].convert("RGB").resize((width, side)))
        for tile in view:
            x0, y0, x1, y1 = (round(share * length) for share, length in zip(tile.box, (width, side) * 2, strict=True))
            across = np.linspace(x0, x1, tile.columns + 1).round().astype(int)
            down = np.linspace(y0, y1, tile.rows + 1).round().astype(int)
            if tile.box[0] > 0:
                picture[y0:y1, x0 - 1 : x0 + 1] = 255
            if tile.box[1] > 0:
                picture[y0 - 1 : y0 + 1, x0:x1] = 255
            for row in range(tile.rows):
                for column in range(tile.columns):
                    cells[tile.first + row * tile.step + column] = (
                        slice(down[row], down[row + 1]),
                        slice(left + across[column], left + across[column + 1]),
                    )
        pictures += [np.full((side, gap, 3), 255, np.uint8), picture]
        left += width + gap
    return np.concatenate(pictures[1:], axis=1), cells


def _fade(strip: np.ndarray, cells: Mapping[int, tuple[slice, slice]], kept: Sequence[int]) -> np.ndarray:
    faded = (strip + (255 - strip) * _FADED).astype(np.uint8)
    for token in kept:
        if token in cells:  # else it ends a row
            faded[cells[token]] = strip[cells[token]]
    return faded
