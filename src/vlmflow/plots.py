"""Figures from results; nothing here computes one, and no torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from vlmflow.records.files import replacing

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
_FULL = np.array([0.62, 0.10, 0.0])  # the colour of the patch that matters most; dark, so that it is seen in print


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


@dataclass(frozen=True)
class Promise:
    """What theory promised a method, and what was measured with its interval; how many times as fast, or as small."""

    method: str
    promised: float
    value: float
    low: float
    high: float


def promises(path: Path, panels: Mapping[str, Sequence[Promise]], title: str) -> None:
    """Draw measurements against what theory promised, a panel each: on the diagonal a promise was kept."""
    figure = Figure(figsize=(3.8 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    names = list(dict.fromkeys(promise.method for panel in panels.values() for promise in panel))
    for axis, (label, panel) in zip(axes, panels.items(), strict=True):
        ends = [x for promise in panel for x in (promise.promised, promise.low, promise.high)]
        low, high = min([1.0, *ends]) * 0.95, max([1.0, *ends]) * 1.05
        axis.plot([low, high], [low, high], color="0.5", linewidth=1, linestyle=":", zorder=1)
        for promise in panel:
            number = names.index(promise.method)
            axis.vlines(promise.promised, promise.low, promise.high, color=_COLOURS[number], linewidth=1.2, alpha=0.6)
            axis.plot(promise.promised, promise.value, _MARKERS[number], color=_COLOURS[number], markersize=6)
        axis.set(xlabel=f"{label}: promised", ylabel="measured", xlim=(low, high), ylim=(low, high))
        axis.grid(alpha=0.25)
    looks = [Line2D([], [], color=_COLOURS[n], marker=_MARKERS[n], linestyle="", label=m) for n, m in enumerate(names)]
    figure.legend(handles=looks, loc="outside lower center", ncols=len(names), fontsize=9)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _beats(one: Point, other: Point) -> bool:
    at_least = one.cost <= other.cost and one.value >= other.value
    return at_least and (one.cost < other.cost or one.value > other.value)


# -- figures of the analysis: each as PNG, to look at, and as SVG, to print


@dataclass(frozen=True)
class Curve:
    """Values with their intervals, one at each place; nan where there is none."""

    value: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


_DASHES = ("-", "--", ":", "-.")


def by_layer(stem: Path, layers: Sequence[int], curves: Mapping[str, Curve], ylabel: str, title: str) -> None:
    """Draw positive measures by layer on a logarithmic scale, with bands for their intervals; zeros are left out."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axis = figure.subplots()
    for number, (name, curve) in enumerate(curves.items()):
        value, low, high = (
            np.where((numbers := np.array(row, float)) > 0, numbers, np.nan)
            for row in (curve.value, curve.low, curve.high)
        )
        axis.fill_between(layers, low, high, color=_COLOURS[number], alpha=0.2, linewidth=0)
        axis.plot(layers, value, label=name, gid=name, **_style(number))
    axis.set_yscale("log")
    _by_number(axis, layers)
    axis.set(xlabel="layer", ylabel=ylabel)
    axis.legend(fontsize=9)
    figure.suptitle(title, fontsize=10)
    _save_both(figure, stem)


def consistencies(stem: Path, places: Sequence[str], panels: Mapping[str, Mapping[str, Curve]], title: str) -> None:
    """Draw what disturbances leave at each place: a panel a measure, a row of points with intervals a disturbance."""
    figure = Figure(figsize=(3.4 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (measure, curves) in zip(axes, panels.items(), strict=True):
        for number, (name, curve) in enumerate(curves.items()):
            x = np.arange(len(places)) + 0.12 * (2 * number - len(curves) + 1)
            _points(axis, x, curve, number, name, f"{measure}: {name}")
        axis.set_xticks(range(len(places)), places)
        axis.set_xlim(-0.5, len(places) - 0.5)
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("blocked in")
        axis.set_title(measure, fontsize=10)
        axis.grid(axis="y", alpha=0.25)
    axes[0].set_ylabel("consistency (95 % intervals)")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(handles), fontsize=9)
    figure.suptitle(title, fontsize=10)
    _save_both(figure, stem)


def log_ratios(stem: Path, places: Sequence[str], lost: Mapping[str, Curve], ratio: Curve, title: str) -> None:
    """Draw what each disturbance takes away at each place, and below the logarithm of their ratio.

    An infinite ratio stands as an arrow at the panel's edge.
    """
    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.2))
    x = np.arange(len(places))
    for number, (name, curve) in enumerate(lost.items()):
        _points(upper, x + 0.08 * (2 * number - len(lost) + 1), curve, number, name, name)
    upper.set_ylabel("E: score consistency lost")
    figure.legend(loc="outside lower center", ncols=len(lost), fontsize=9)
    bounds = np.array([ratio.value, ratio.low, ratio.high], float)
    finite = np.abs(bounds[np.isfinite(bounds)])
    edge = 1.15 * max(finite.max(initial=0.0), 0.5)
    lower.axhline(0, color="0.5", linewidth=1)
    value, low, high = np.clip(bounds, -edge, edge)
    lower.vlines(x, low, high, color="0.35", linewidth=1.5)
    shown = np.where(np.isinf(bounds[0]), np.nan, bounds[0])
    lower.plot(x, shown, "o", color="black", markersize=6, gid="D")
    for sign, marker in ((1, "^"), (-1, "v")):
        beyond = np.isinf(bounds[0]) & (np.sign(bounds[0]) == sign)
        if beyond.any():  # unclipped and empty, it would claim room down to the figure's corner
            lower.plot(x[beyond], value[beyond], marker, color="black", markersize=9, fillstyle="none", clip_on=False)
    lower.set_ylim(-edge, edge)
    lower.set_ylabel("D = log(E_vv / E_vt)")
    lower.text(0.01, 0.97, "intra-visual flow matters more", transform=lower.transAxes, va="top", fontsize=8)
    lower.text(0.01, 0.03, "visual-textual flow matters more", transform=lower.transAxes, va="bottom", fontsize=8)
    lower.set_xticks(x, places, rotation=90 if len(places) > 12 else 0)
    lower.set_xlabel("layers blocked")
    for axis in (upper, lower):
        axis.grid(axis="y", alpha=0.25)
    figure.suptitle(title, fontsize=10)
    _save_both(figure, stem)


def lengths(stem: Path, segments: Mapping[str, Sequence[int]], title: str) -> None:
    """Draw how many tokens each segment has: a histogram each, on axes of their own."""
    figure = Figure(figsize=(2.6 * len(segments), 2.6), layout="constrained")
    axes = figure.subplots(1, len(segments), squeeze=False)[0]
    for number, (axis, (name, counts)) in enumerate(zip(axes, segments.items(), strict=True)):
        low, high = min(counts), max(counts)
        step = max(1, -(-(high - low + 1) // 30))
        edges = np.arange(low, high + step + 1, step) - 0.5
        axis.hist(counts, bins=edges.tolist(), color=_COLOURS[number], edgecolor="white", linewidth=0.4, gid=name)
        median = f"{np.median(counts):g}"
        axis.set_title(f"{name}: {low if low == high else f'{low} to {high}, median {median}'}", fontsize=9)
        axis.set_xlim(low - 0.5 - max(1, step), high + 0.5 + max(1, step))
        _by_number(axis, range(low, high + 1))
        axis.set_xlabel("tokens")
    axes[0].set_ylabel("samples")
    figure.suptitle(title, fontsize=10)
    _save_both(figure, stem)


def flow_maps(
    stem: Path,
    images: Sequence[Image.Image],
    grids: Sequence[tuple[int, int]],
    layers: Sequence[int],
    flows: Mapping[str, np.ndarray],
    title: str,
) -> None:
    """Draw over the images, layer by layer, how important the flow from each image token is.

    ``flows`` maps a label to (layer, image token). Each picture has its own scale, from grey for nothing to full colour
    for its largest; the share above it is that of the layer in this flow over all layers shown.
    """
    strip, cells = _side_by_side(images, grids)
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
            for token, cell in enumerate(cells):
                heat[cell] = importance[number, token] / (importance[number].max() or 1.0)
            axis.imshow(_FULL * heat + grey * (1 - heat))
            share = f"{importance[number].sum() / total:.0%}" if total > 0 else "none"
            above = "" if number % columns else f"{label}\n"
            axis.set_title(f"{above}layer {layer}: {share}", fontsize=8, loc="left")
    figure.suptitle(title, fontsize=10, wrap=True)
    _save_both(figure, stem)


def _style(number: int) -> dict[str, Any]:
    """One of the looks that are told apart by colour, mark and dashes alike."""
    return {
        "color": _COLOURS[number],
        "marker": _MARKERS[number],
        "linestyle": _DASHES[number % len(_DASHES)],
        "markersize": 5,
        "linewidth": 1.4,
    }


def _points(axis: Axes, x: np.ndarray, curve: Curve, number: int, label: str, gid: str) -> None:
    """Points with intervals."""
    value, low, high = (np.array(row, float) for row in (curve.value, curve.low, curve.high))
    axis.vlines(x, low, high, color=_COLOURS[number], linewidth=1.5)
    axis.plot(x, value, _MARKERS[number], color=_COLOURS[number], markersize=6, label=label, gid=gid)


def _by_number(axis: Axes, numbers: Sequence[int]) -> None:
    """Ticks at whole numbers, few enough to read."""
    step = max(1, -(-len(numbers) // 12))
    axis.set_xticks(numbers[::step])
    axis.grid(axis="y", alpha=0.25)


def _save_both(figure: Figure, stem: Path) -> None:
    """As PNG and SVG; the same figure gives the same bytes."""
    with matplotlib.rc_context({"svg.hashsalt": stem.name}):
        _save(figure, stem.with_suffix(".png"))
        _save(figure, stem.with_suffix(".svg"))


def _save(figure: Figure, path: Path) -> None:
    """Write a picture whole or not at all."""
    undated = {"Date": None} if path.suffix == ".svg" else {}
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=150, metadata=undated)
