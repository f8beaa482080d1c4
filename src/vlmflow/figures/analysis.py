"""The paper's analysis in figures, each as PNG, to look at, and as SVG, to print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlmflow.core.statistics import Interval
from vlmflow.figures.style import COLOURS, MARKERS, save_both

Curve = Sequence[Interval]  # a value with its interval at each place; nan where there is none


def by_layer(stem: Path, layers: Sequence[int], curves: Mapping[str, Curve], ylabel: str, title: str) -> None:
    """Draw positive measures by layer on a logarithmic scale, with bands for their intervals; zeros are left out."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axis = figure.subplots()
    for number, (name, curve) in enumerate(curves.items()):
        numbers = _numbers(curve)
        value, low, high = np.where(numbers > 0, numbers, np.nan)
        axis.fill_between(layers, low, high, color=COLOURS[number], alpha=0.2, linewidth=0)
        (line,) = axis.plot(layers, value, label=name, gid=name, markersize=5, linewidth=1.4)
        line.set(color=COLOURS[number], marker=MARKERS[number], linestyle=("-", "--", ":")[number])
    axis.set_yscale("log")
    _by_number(axis, layers)
    axis.set(xlabel="layer", ylabel=ylabel)
    axis.legend(fontsize=9)
    figure.suptitle(title, fontsize=10)
    save_both(figure, stem)


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
    save_both(figure, stem)


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
    bounds = _numbers(ratio)
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
    save_both(figure, stem)


def lengths(stem: Path, segments: Mapping[str, Sequence[int]], title: str) -> None:
    """Draw how many tokens each segment has: a histogram each, on axes of their own."""
    figure = Figure(figsize=(2.6 * len(segments), 2.6), layout="constrained")
    axes = figure.subplots(1, len(segments), squeeze=False)[0]
    for number, (axis, (name, counts)) in enumerate(zip(axes, segments.items(), strict=True)):
        low, high = min(counts), max(counts)
        step = max(1, -(-(high - low + 1) // 30))
        edges = np.arange(low, high + step + 1, step) - 0.5
        axis.hist(counts, bins=edges.tolist(), color=COLOURS[number], edgecolor="white", linewidth=0.4, gid=name)
        median = f"{np.median(counts):g}"
        axis.set_title(f"{name}: {low if low == high else f'{low} to {high}, median {median}'}", fontsize=9)
        axis.set_xlim(low - 0.5 - max(1, step), high + 0.5 + max(1, step))
        _by_number(axis, range(low, high + 1))
        axis.set_xlabel("tokens")
    axes[0].set_ylabel("samples")
    figure.suptitle(title, fontsize=10)
    save_both(figure, stem)


def _numbers(curve: Curve) -> np.ndarray:
    """Values, lower and upper bounds, in three rows."""
    return np.array([(interval.value, interval.low, interval.high) for interval in curve]).T


def _points(axis: Axes, x: np.ndarray, curve: Curve, number: int, label: str, gid: str) -> None:
    """Points with intervals."""
    value, low, high = _numbers(curve)
    axis.vlines(x, low, high, color=COLOURS[number], linewidth=1.5)
    axis.plot(x, value, MARKERS[number], color=COLOURS[number], markersize=6, label=label, gid=gid)


def _by_number(axis: Axes, numbers: Sequence[int]) -> None:
    """Ticks at whole numbers, few enough to read."""
    step = max(1, -(-len(numbers) // 12))
    axis.set_xticks(numbers[::step])
    axis.grid(axis="y", alpha=0.25)
