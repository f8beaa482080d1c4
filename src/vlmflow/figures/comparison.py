"""Methods side by side: a benchmark's figure against its cost, measurements against what theory promised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vlmflow.core.statistics import Interval
from vlmflow.figures.style import COLOURS, MARKERS, save


@dataclass(frozen=True)
class Point:
    """A figure with its interval, at a cost in percent of the unpruned run's."""

    cost: float
    value: float
    low: float
    high: float


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
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
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
    save(figure, path)


@dataclass(frozen=True)
class Promise:
    """What theory promised a method, and what was measured: how many times as fast, or as small."""

    method: str
    promised: float
    measured: Interval


def promises(path: Path, panels: Mapping[str, Sequence[Promise]], title: str) -> None:
    """Draw measurements against what theory promised, a panel each: on the diagonal a promise was kept."""
    figure = Figure(figsize=(3.8 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    names = list(dict.fromkeys(promise.method for panel in panels.values() for promise in panel))
    for axis, (label, panel) in zip(axes, panels.items(), strict=True):
        ends = [x for promise in panel for x in (promise.promised, promise.measured.low, promise.measured.high)]
        low, high = min([1.0, *ends]) * 0.95, max([1.0, *ends]) * 1.05
        axis.plot([low, high], [low, high], color="0.5", linewidth=1, linestyle=":", zorder=1)
        for promise in panel:
            number, x, measured = names.index(promise.method), promise.promised, promise.measured
            axis.vlines(x, measured.low, measured.high, color=COLOURS[number], linewidth=1.2, alpha=0.6)
            axis.plot(x, measured.value, MARKERS[number], color=COLOURS[number], markersize=6)
        axis.set(xlabel=f"{label}: promised", ylabel="measured", xlim=(low, high), ylim=(low, high))
        axis.grid(alpha=0.25)
    looks = [Line2D([], [], color=COLOURS[n], marker=MARKERS[n], linestyle="", label=m) for n, m in enumerate(names)]
    figure.legend(handles=looks, loc="outside lower center", ncols=len(names), fontsize=9)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def _beats(point: Point, other: Point) -> bool:
    at_least = point.cost <= other.cost and point.value >= other.value
    return at_least and (point.cost < other.cost or point.value > other.value)
