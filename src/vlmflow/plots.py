"""Figures from results; nothing here computes one, and no torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

_WIDTH = 2.2  # inches that one picture takes
_COLUMNS = 4
_FADED = 0.82  # how far a dropped patch goes towards white


def kept_patches(
    path: Path,
    images: Sequence[Image.Image],
    grids: Sequence[tuple[int, int]],
    methods: Mapping[str, Mapping[int, Sequence[int]]],
    title: str,
) -> None:
    """Draw the images, then what each method kept of them at each stage, dropped patches faded.

    ``grids`` gives rows and columns of each image's tokens; ``methods`` maps a label to its stages: layer -> numbers of
    the image tokens that stayed.
    """
    strip, cells = _side_by_side(images, grids)
    panels = [("what the model sees", f"{len(cells)} image tokens", strip)]
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
    _save(figure, path)


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


@dataclass(frozen=True)
class Point:
    """A figure with its interval, at a cost in percent of the unpruned run's."""

    cost: float
    value: float
    low: float
    high: float


_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito, told apart by all
_MARKERS = "osD^vP"


def pareto(
    path: Path, panels: Mapping[str, Mapping[str, Sequence[Point]]], unpruned: Point, figure_name: str, title: str
) -> None:
    """Draw a figure against its cost, a panel a way of counting, a line a method; what no other point beats is ringed.

    ``panels`` maps an axis label to methods and their points; ``unpruned`` stands at 100 %.
    """
    figure = Figure(figsize=(5.6 * len(panels), 4.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (label, methods) in zip(axes, panels.items(), strict=True):
        axis.axhspan(unpruned.low, unpruned.high, color="0.93", zorder=0)
        axis.axhline(unpruned.value, color="0.5", linewidth=1, linestyle=":", zorder=1)
        axis.plot(100, unpruned.value, "*", color="black", markersize=12, label="unpruned")
        everything = [unpruned, *(point for points in methods.values() for point in points)]
        for number, (name, points) in enumerate(methods.items()):
            colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
            ordered = sorted(points, key=lambda point: point.cost)
            x, y = [point.cost for point in ordered], [point.value for point in ordered]
            below, above = [p.value - p.low for p in ordered], [p.high - p.value for p in ordered]
            axis.errorbar(x, y, [below, above], color=colour, fmt="none", elinewidth=1, capsize=2, alpha=0.55)
            axis.plot(x, y, color=colour, marker=marker, markersize=6, linewidth=1.2, label=name)
        best = [p for p in everything if not any(_beats(q, p) for q in everything)]
        x, y = [point.cost for point in best], [point.value for point in best]
        axis.plot(x, y, "o", color="black", markersize=13, fillstyle="none", label="not beaten")
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"{figure_name} (95 % intervals)")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=9)
    _save(figure, path)


def _beats(one: Point, other: Point) -> bool:
    at_least = one.cost <= other.cost and one.value >= other.value
    return at_least and (one.cost < other.cost or one.value > other.value)


def _save(figure: Figure, path: Path) -> None:
    """Write a picture whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format=path.suffix[1:], dpi=150)
    partial.replace(path)
