"""Figures from results; nothing here computes one, and no torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

_CELL = 1.9  # inches that one picture takes
_FADED = 0.82  # how far a dropped patch goes towards white


def kept_patches(
    path: Path,
    images: Sequence[Image.Image],
    grids: Sequence[tuple[int, int]],
    methods: Mapping[str, Mapping[int, Sequence[int]]],
    title: str,
) -> None:
    """Draw which patches each method kept: a row a method, a column a stage, dropped patches faded.

    ``grids`` gives rows and columns of each image's tokens; ``methods`` maps a label to its stages: layer -> numbers of
    the image tokens that stayed.
    """
    strip, cells = _side_by_side(images, grids)
    n_columns = 1 + max([1, *(len(stages) for stages in methods.values())])
    height = strip.shape[0] / strip.shape[1]
    figure = Figure(figsize=(_CELL * n_columns, (_CELL * height + 0.28) * len(methods) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=9, wrap=True)
    axes = figure.subplots(len(methods), n_columns, squeeze=False)
    n_tokens = sum(rows * columns for rows, columns in grids)
    for row, (label, stages) in zip(axes, methods.items(), strict=True):
        for axis in row:
            axis.set_axis_off()
        row[0].imshow(strip)
        row[0].set_title(label, fontsize=8, loc="left", fontweight="bold")
        for axis, (layer, kept) in zip(row[1:], stages.items(), strict=False):
            axis.imshow(_fade(strip, cells, kept))
            axis.set_title(f"layer {layer} on: {len(kept)} of {n_tokens}", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format=path.suffix[1:], dpi=160)
    partial.replace(path)


def _side_by_side(
    images: Sequence[Image.Image], grids: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, list[tuple[slice, slice]]]:
    """All images at one height in a row, and the pixels of each image token in it."""
    side = max(rows for rows, _ in grids) * 16
    pictures, cells, left = [], [], 0
    for image, (rows, columns) in zip(images, grids, strict=True):
        width = round(side * columns / rows)
        pictures.append(np.asarray(image.convert("RGB").resize((width, side))))
        across = left + np.linspace(0, width, columns + 1).round().astype(int)
        down = np.linspace(0, side, rows + 1).round().astype(int)
        cells += [
            (slice(down[row], down[row + 1]), slice(across[column], across[column + 1]))
            for row in range(rows)
            for column in range(columns)
        ]
        left += width
    return np.concatenate(pictures, axis=1), cells


def _fade(strip: np.ndarray, cells: Sequence[tuple[slice, slice]], kept: Sequence[int]) -> np.ndarray:
    faded = (strip + (255 - strip) * _FADED).astype(np.uint8)
    for token in kept:
        faded[cells[token]] = strip[cells[token]]
    return faded
