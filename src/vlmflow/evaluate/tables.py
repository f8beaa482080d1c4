"""Tables of many results: method by budget, and the form of the paper's Tables 1 and 2; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmflow.evaluate.rows import outcomes_of
from vlmflow.records.files import RecordError
from vlmflow.records.folder import SETTINGS, SUMMARY, Folder, differences
from vlmflow.records.schema import EvaluationSummary, Line, from_json
from vlmflow.records.table import Table
from vlmflow.tasks import TASKS, Task

COSTS = (
    "Costs are those of the prefill, means over samples, as shares of the unpruned run. "
    "A layer: image tokens that enter a layer, in the mean over layers; of all: as a share of a prompt's image tokens. "
    "Eq. 10: the paper's FLOPs, which count multiply-adds of image tokens only, no text. "
    "Exact: every matrix product of the text decoder at two FLOPs a multiply-add, text, head and ranking included. "
    "KV: bytes of the cache after the prefill. Intervals are 95 % bootstraps over images; Δ is the difference to the "
    "unpruned run on the same samples, paired."
)
_MISSING = "-"


@dataclass(frozen=True)
class Result:
    """A finished run."""

    path: Path
    summary: EvaluationSummary

    @classmethod
    def read(cls, path: Path) -> Result:
        """A run's folder.

        Raises:
            RecordError: it is not finished, or broken.
        """
        return cls(path, from_json(EvaluationSummary, Folder(path).summary(), path / SUMMARY))

    @property
    def settings(self) -> dict[str, Any]:
        """What was evaluated, and how."""
        return self.summary.settings

    @property
    def task(self) -> Task:
        """The benchmark."""
        if self.settings["task"] not in TASKS:
            raise RecordError(f"{self.path}: unknown task {self.settings['task']!r}")
        return TASKS[self.settings["task"]]

    @property
    def method(self) -> str:
        """The pruner's name."""
        return self.settings["pruner"]["name"]

    @property
    def fields(self) -> str:
        """The pruner's fields, short."""
        return " ".join(f"{name}={_short(value)}" for name, value in self.settings["pruner"].items() if name != "name")

    def not_comparable(self, other: Result) -> list[str]:
        """What differs between two runs beside the pruner."""
        ours, theirs = (
            {name: value for name, value in one.settings.items() if not name.startswith("pruner")}
            for one in (other, self)
        )
        return differences(ours, theirs)

    def cost(self, measure: str, pruned: bool = True) -> float | None:
        """A measure of `Cost.table`, in the mean over samples."""
        cost = self.summary.cost
        if cost is None:
            return None
        figure = cost["table"][measure][int(pruned)]
        return figure if measure == "mean_image_tokens" else figure / cost["samples"]

    def share(self, measure: str) -> float | None:
        """A measure's pruned figure over its unpruned one."""
        return None if self.summary.cost is None else self.summary.cost["shares"][measure]


def line(result: Result, baseline: Result | None = None, budget: float | None = None) -> Line:
    """A run, compared with the unpruned one where there is one like it.

    ``p`` is McNemar's exact one where scores are right or wrong, else the paired bootstrap's.
    """
    metric, samples = result.summary.metric or {}, result.summary.samples
    low, high = metric.get("interval") or (None, None)
    difference, note = None, ""
    if baseline is not None and baseline.path != result.path:
        if other := result.not_comparable(baseline):
            note = f"not compared with the unpruned run: {other[0]}"
        else:
            difference = compare(baseline, result)
    delta, p, bounds = None, None, (None, None)
    if difference is not None:
        delta, bounds = difference["difference"], difference["interval"] or bounds
        p = difference["p_bootstrap"] if difference["p_mcnemar"] is None else difference["p_mcnemar"]
    return Line(
        model=result.settings["model"],
        task=result.settings["task"],
        method=result.method,
        fields=result.fields,
        budget=budget,
        folder=str(result.path),
        figure=metric.get("figure"),
        value=metric.get("value"),
        low=low,
        high=high,
        difference=delta,
        difference_low=bounds[0],
        difference_high=bounds[1],
        p=p,
        mean_image_tokens=result.cost("mean_image_tokens"),
        mean_image_tokens_share=result.share("mean_image_tokens"),
        eq10_flops=result.cost("paper_flops"),
        eq10_share=result.share("paper_flops"),
        exact_flops=result.cost("exact_flops"),
        exact_share=result.share("exact_flops"),
        kv_share=result.share("kv_bytes"),
        samples=samples.answered,
        failed=samples.failed,
        unparsed=metric.get("unparsed", 0),
        excluded=metric.get("excluded", 0),
        note=note,
    )


def compare(baseline: Result, result: Result) -> dict[str, Any] | None:
    """`Task.compare` on the samples that both have answered, None where there is none."""
    pair = [{own.sample.id: own for own in outcomes_of(Folder(one.path))} for one in (baseline, result)]
    both = [key for key in pair[0] if key in pair[1]]
    if not both:
        return None
    first, second = ([outcomes[key] for key in both] for outcomes in pair)
    return result.task.compare(first, second, result.settings["seed"])


def table_of(lines: Sequence[Line]) -> Table:
    """Lines with all that is known of them, a column a field."""
    return Table(list(Line.__dataclass_fields__), [list(vars(line).values()) for line in lines])


def budget_grid(lines: Sequence[Line], title: str, wide: bool) -> Table:
    """Method by budget: the figure, what it lost, and what it cost by every convention; ``wide`` with all columns."""
    columns: dict[str, list[str]] = {}
    figure = next((own.figure for own in lines if own.figure), "figure")
    for own in lines:
        counts = {"failed": own.failed, "unparsed": own.unparsed, "unmarked": own.excluded}
        cells = {
            "method": own.method,
            "budget": _number(own.budget, ".0%"),
            figure: _with_interval(own.value, own.low, own.high),
            "Δ": _with_interval(own.difference, own.difference_low, own.difference_high, "+.1f"),
            "p": _number(own.p, ".2g"),
            "a layer": _number(own.mean_image_tokens, ".1f"),
            "of all": _number(own.mean_image_tokens_share, ".1%"),
            "Eq. 10": _number(own.eq10_share, ".1%"),
            "exact": _number(own.exact_share, ".1%"),
            "KV": _number(own.kv_share, ".1%"),
            "fields": own.fields,
            "of them": ", ".join(f"{count} {name}" for name, count in counts.items() if count),
        }
        for name, cell in cells.items():
            columns.setdefault(name, []).append(cell)
    if not wide:
        columns = {name: cells for name, cells in columns.items() if name not in ("p", "a layer", "fields", "of them")}
    return Table(list(columns), list(zip(*columns.values(), strict=True)), title)


def group_grid(results: Sequence[tuple[str, Result]], title: str) -> Table | None:
    """The figure of every part of a benchmark, a column a labelled run; None where the benchmark has no parts."""
    columns = [one.task.parts(outcomes_of(Folder(one.path)), one.settings["seed"]) for _, one in results]
    groups = list(dict.fromkeys(group for parts in columns for group in parts))
    if len(groups) < 2:
        return None
    rows = []
    for group in groups:
        found = [parts.get(group) for parts in columns]
        rows.append((group, *(_with_interval(part.value, part.low, part.high) if part else _MISSING for part in found)))
    return Table(["", *(label for label, _ in results)], rows, title)


def find_results(paths: Sequence[Path]) -> tuple[list[Result], dict[Path, str]]:
    """The finished runs in or below the folders, and the folders that are left out, with what they are.

    Raises:
        RecordError: no such folder, or no run in it.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise RecordError(f"{path}: no such folder")
        below = sorted(settings.parent for settings in path.rglob(SETTINGS))
        if not below:
            raise RecordError(f"{path}: holds no results of vlmflow eval or sweep")
        found |= dict.fromkeys(below)
    left_out: dict[Path, str] = {}
    for path in found:
        if not (path / SUMMARY).is_file():
            left_out[path] = "not finished"
        elif "experiment" in Folder(path).settings():
            left_out[path] = "an experiment of vlmflow flow"
    return [Result.read(path) for path in found if path not in left_out], left_out


@dataclass(frozen=True)
class Report:
    """Tables in the paper's form, and every run as a line."""

    grids: tuple[Table, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    def markdown(self) -> str:
        """All of it."""
        parts = [grid.markdown() for grid in self.grids]
        return "\n".join([*parts, *(f"- {note}\n" for note in self.notes)])


_FORMS = {
    "qa": "Table 1: multiple choice, hallucination and short answers",
    "caption": "Table 2: captions and open answers",
}


def report(results: Sequence[Result]) -> Report:
    """Put runs into the form of the paper's Tables 1 and 2: models by methods, a column a task.

    Raises:
        RecordError: two runs of one model, method and task, or none at all.
    """
    if not results:
        raise RecordError("no finished run of vlmflow eval or sweep to report")
    cells: dict[tuple[str, str, str], Result] = {}
    labels = _labels(results)
    for one in results:
        key = (one.settings["model"], labels[one.path], one.settings["task"])
        if key in cells:
            other = cells[key]
            why = one.not_comparable(other) or ["nothing else differs"]
            raise RecordError(
                f"{other.path} and {one.path} are both {key[1]} of {key[0]} on {key[2]} ({why[0]}); report them apart"
            )
        cells[key] = one
    baselines = {(model, task): one for (model, _, task), one in cells.items() if one.method == "none"}
    lines = {key: line(one, baselines.get((key[0], key[2]))) for key, one in cells.items()}
    grids = []
    for preset, title in _FORMS.items():
        own = {key: lines[key] for key, one in cells.items() if one.task.preset == preset}
        if own:
            grids += [_scores(own, title), _losses(own, title)]
    notes = ["**A model's best figure**, _its cheapest method_.", COSTS]
    notes += [f"{own.folder}: {own.failed} samples failed" for own in lines.values() if own.failed]
    notes += [f"{own.folder}: {own.unparsed} answers unparsed" for own in lines.values() if own.unparsed]
    notes += [f"{own.folder}: {own.excluded} answers unmarked" for own in lines.values() if own.excluded]
    notes += [f"{own.folder}: {own.note}" for own in lines.values() if own.note]
    return Report(tuple(grid for grid in grids if grid.rows), tuple(lines.values()), tuple(notes))


def _labels(results: Sequence[Result]) -> dict[Path, str]:
    """A method's name, with its fields where a table would hold several of that name."""
    several: dict[tuple[str, str, str], set[str]] = {}
    for one in results:
        several.setdefault((one.settings["model"], one.task.preset, one.method), set()).add(one.fields)
    return {
        one.path: f"{one.method} {one.fields}"
        if len(several[one.settings["model"], one.task.preset, one.method]) > 1
        else one.method
        for one in results
    }


def _scores(lines: dict[tuple[str, str, str], Line], title: str) -> Table:
    tasks = list(dict.fromkeys(task for _, _, task in lines))
    methods = _methods(lines)
    costs = {key: _costs([own for (*row, _), own in lines.items() if tuple(row) == key]) for key in methods}
    largest = max((cost[0] for cost in costs.values() if cost[0] is not None), default=0.0)
    unit, scale = ("TFLOPs", 1e12) if largest >= 1e11 else ("GFLOPs", 1e9)
    header = ("model", "method", f"{unit} (Eq. 10)", "ratio", "exact ratio", *(_head(lines, task) for task in tasks))
    rows = []
    for model, method in methods:
        cells = [model, method]
        for i, cost in enumerate(costs[model, method]):
            least = min((own[i] or 0.0 for (m, _), own in costs.items() if m == model), default=0.0)
            text = _number(cost, ".0%") if i else _number(cost and cost / scale, ".2f")
            cells.append(f"_{text}_" if cost and cost == least else text)
        for task in tasks:
            column = {key: own for key, own in lines.items() if (key[0], key[2]) == (model, task)}
            own = column.get((model, method, task))
            best = max((one.value for one in column.values() if one.value is not None), default=None)
            text = _with_interval(own.value, own.low, own.high) if own else _MISSING
            fair = not any(one.note for one in column.values())
            cells.append(f"**{text}**" if own and fair and own.value is not None and own.value == best else text)
        rows.append(tuple(cells))
    return Table(header, rows, title)


def _head(lines: dict[tuple[str, str, str], Line], task: str) -> str:
    figure = next((own.figure for (*_, t), own in lines.items() if t == task and own.figure), None)
    return f"{task} ({figure})" if figure else task


def _losses(lines: dict[tuple[str, str, str], Line], title: str) -> Table:
    """Differences to the unpruned run."""
    tasks = list(dict.fromkeys(task for _, _, task in lines))
    rows = []
    for model, method in _methods(lines):
        own = [lines.get((model, method, task)) for task in tasks]
        if any(one and one.difference is not None for one in own):
            cells = [
                f"{_with_interval(one.difference, one.difference_low, one.difference_high, '+.1f')}, p = {one.p:.2g}"
                if one and one.difference is not None and one.p is not None
                else _MISSING
                for one in own
            ]
            rows.append((model, method, *cells))
    return Table(("model", "method", *tasks), rows, f"{title}: differences to the unpruned run")


def _methods(lines: dict[tuple[str, str, str], Line]) -> list[tuple[str, str]]:
    """Models in the order given, and of each the unpruned run first, then one method after the other."""
    models = list(dict.fromkeys(model for model, *_ in lines))
    names = {(model, method): own.method for (model, method, _), own in lines.items()}
    order = ["none", *sorted({*names.values()} - {"none"}, key=list(dict.fromkeys(names.values())).index)]
    return sorted(names, key=lambda key: (models.index(key[0]), order.index(names[key])))


def _costs(lines: Sequence[Line]) -> tuple[float | None, float | None, float | None]:
    """Eq. 10's FLOPs and both shares, in the mean over the tasks."""

    def mean(values: list[float | None]) -> float | None:
        held = [value for value in values if value is not None]
        return sum(held) / len(held) if held else None

    return (
        mean([own.eq10_flops for own in lines]),
        mean([own.eq10_share for own in lines]),
        mean([own.exact_share for own in lines]),
    )


def _with_interval(value: float | None, low: float | None, high: float | None, form: str = ".1f") -> str:
    if value is None:
        return _MISSING
    return f"{value:{form}}" if low is None or high is None else f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _number(value: float | None, form: str) -> str:
    return _MISSING if value is None else f"{value:{form}}"


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
