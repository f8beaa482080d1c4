"""Tables of many results: method by budget, and the form of the paper's Tables 1 and 2; no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmflow.core.errors import typed_line
from vlmflow.core.statistics import too_few
from vlmflow.evaluate.rows import outcomes_of
from vlmflow.records.files import RecordError
from vlmflow.records.folder import SETTINGS, SUMMARY, Folder, differences
from vlmflow.records.schema import EvaluationSummary, Line, from_json
from vlmflow.records.table import Table
from vlmflow.tasks import TASKS, Task
from vlmflow.tasks.core import groups_of, images_of

COSTS = (
    "Costs are those of the prefill, means over samples, as shares of the unpruned run. "
    "A layer: image tokens that enter a layer, in the mean over layers; of all: as a share of a prompt's image tokens. "
    "Eq. 10: the paper's FLOPs, which count multiply-adds of image tokens only, no text. "
    "Exact: every matrix product of the text decoder at two FLOPs a multiply-add, text, head and ranking included. "
    "KV: bytes of the cache after the prefill. Intervals are of 95 % over images, Wilson's for shares of right answers "
    "and else bootstraps; Δ is the difference to the unpruned run on the same samples, paired."
)
_MISSING = "-"
Key = tuple[str, str, str]  # of a reported line: model, method with its fields where needed, task


@dataclass(frozen=True)
class Result:
    """A finished run."""

    path: Path
    summary: EvaluationSummary

    @classmethod
    def read(cls, path: Path) -> Result:
        """A run's folder; a ``RecordError`` where it is not finished, or broken."""
        result = cls(path, from_json(EvaluationSummary, Folder(path).summary(), path / SUMMARY))
        try:
            line_of(result)
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise RecordError(f"{path / SUMMARY}: no summary of vlmflow eval ({typed_line(error)})") from error
        return result

    @property
    def settings(self) -> dict[str, Any]:
        """What was evaluated, and how."""
        return self.summary.settings

    @property
    def metric(self) -> dict[str, Any]:
        """The task's figure; one whose interval has no width, as an earlier version's of all right, is made anew."""
        metric = self.summary.metric or {}
        low, high = metric.get("interval") or (0, 1)
        if low == high and (outcomes := outcomes_of(Folder(self.path))):
            return self.task.metric(outcomes, self.settings["seed"])
        return metric

    @property
    def common(self) -> dict[str, Any]:
        """The settings that runs of other pruners share."""
        return {name: value for name, value in self.settings.items() if not name.startswith("pruner")}

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


def line_of(result: Result, baseline: Result | None = None, budget: float | None = None) -> Line:
    """A run, compared with the unpruned run of the same settings, if there is one.

    ``p`` is McNemar's exact one where scores are right or wrong, else the paired bootstrap's.
    """
    metric, samples = result.metric, result.summary.samples
    low, high = metric.get("interval") or (None, None)
    loss: dict[str, Any] = {}
    note = ""
    if baseline is not None and baseline.path != result.path:
        if differing := differences(baseline.common, result.common):
            note = f"not compared with the unpruned run: {differing[0]}"
        else:
            loss = compare(baseline, result) or {}
    difference_low, difference_high = loss.get("interval") or (None, None)
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
        difference=loss.get("difference"),
        difference_low=difference_low,
        difference_high=difference_high,
        p=loss.get("p_bootstrap") if loss.get("p_mcnemar") is None else loss["p_mcnemar"],
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
        images=metric.get("images"),
    )


def notes_on(lines: Sequence[Line]) -> list[str]:
    """The lines' notes, and what must be said of their intervals, each once."""
    notes = [line.note for line in lines if line.note]
    notes += [f"{line.task}: {too_few(line.images)}" for line in lines if line.images and too_few(line.images)]
    return list(dict.fromkeys(notes))


def compare(baseline: Result, result: Result) -> dict[str, Any] | None:
    """`Task.compare` on the samples that both have answered, None where there is none."""
    first, second = (
        {outcome.sample.id: outcome for outcome in outcomes_of(Folder(run.path))} for run in (baseline, result)
    )
    both = [key for key in first if key in second]
    if not both:
        return None
    seed = result.settings["seed"]
    return result.task.compare([first[key] for key in both], [second[key] for key in both], seed)


def table_of(lines: Sequence[Line]) -> Table:
    """Lines with all that is known of them, a column a field."""
    return Table(list(Line.__dataclass_fields__), [list(vars(line).values()) for line in lines])


_WIDE = ("p", "a layer", "fields", "of them")  # columns that a terminal has no room for


def budget_grid(lines: Sequence[Line], title: str, wide: bool = True) -> Table:
    """Method by budget: the figure, what it lost, and what it cost by every convention; ``wide`` with all columns."""
    rows = []
    figure = next((line.figure for line in lines if line.figure), "figure")
    for line in lines:
        counts = {"failed": line.failed, "unparsed": line.unparsed, "unmarked": line.excluded}
        row = {
            "method": line.method,
            "budget": _number(line.budget, ".0%"),
            figure: _number(line.value, ".1f", line.low, line.high),
            "Δ": _number(line.difference, "+.1f", line.difference_low, line.difference_high),
            "p": _number(line.p, ".2g"),
            "a layer": _number(line.mean_image_tokens, ".1f"),
            "of all": _number(line.mean_image_tokens_share, ".1%"),
            "Eq. 10": _number(line.eq10_share, ".1%"),
            "exact": _number(line.exact_share, ".1%"),
            "KV": _number(line.kv_share, ".1%"),
            "fields": line.fields,
            "of them": ", ".join(f"{count} {name}" for name, count in counts.items() if count),
        }
        rows.append({name: cell for name, cell in row.items() if wide or name not in _WIDE})
    return Table(list(rows[0]), [list(row.values()) for row in rows], f"{title}: every method at every budget")


def group_grid(results: Sequence[tuple[str, Result]], title: str) -> Table | None:
    """The figure of every part of a benchmark, a column a labelled run; None where the benchmark has no parts.

    The images of a part are those of the first run.
    """
    outcomes = [outcomes_of(Folder(run.path)) for _, run in results]
    columns = [run.task.parts(own, run.settings["seed"]) for own, (_, run) in zip(outcomes, results, strict=True)]
    part_of, images = groups_of(outcomes[0]), images_of(outcomes[0])
    groups = list(dict.fromkeys(group for parts in columns for group in parts))
    if len(groups) < 2:
        return None
    rows = []
    for group in groups:
        parts = [column.get(group) for column in columns]
        cells = [_number(part.value, ".1f", part.low, part.high) if part else _MISSING for part in parts]
        rows.append((group, len({*images[part_of == group].tolist()}), *cells))
    return Table(["", "images", *(label for label, _ in results)], rows, title)


def find_results(paths: Sequence[Path]) -> tuple[list[Result], dict[Path, str]]:
    """The finished runs in or below the folders, and the folders that are left out, with what they are.

    Raises:
        RecordError: no such folder, or no run in it.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise RecordError(f"{path}: no such folder")
        below = sorted(settings.parent for settings in path.rglob(SETTINGS))
        if not below:
            raise RecordError(f"{path}: holds no results of vlmflow eval or sweep")
        folders |= dict.fromkeys(below)
    left_out: dict[Path, str] = {}
    for path in folders:
        if not (path / SUMMARY).is_file():
            left_out[path] = "not finished"
        elif "experiment" in Folder(path).settings():
            left_out[path] = "an experiment of vlmflow flow"
    return [Result.read(path) for path in folders if path not in left_out], left_out


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
    runs: dict[Key, Result] = {}
    labels = _labels(results)
    for run in results:
        key = (run.settings["model"], labels[run.path], run.settings["task"])
        if (other := runs.setdefault(key, run)) is not run:
            why = differences(other.common, run.common) or ["nothing else differs"]
            raise RecordError(
                f"{other.path} and {run.path} are both {key[1]} of {key[0]} on {key[2]} ({why[0]}); report them apart"
            )
    unpruned = {(model, task): run for (model, _, task), run in runs.items() if run.method == "none"}
    lines = {key: line_of(run, unpruned.get((key[0], key[2]))) for key, run in runs.items()}
    grids = []
    for preset, title in _FORMS.items():
        of_preset = {key: lines[key] for key, run in runs.items() if run.task.preset == preset}
        if of_preset:
            grids += [_scores(of_preset, title), _losses(of_preset, title)]
    notes = ["**A model's best figure**, _its cheapest method_.", COSTS]
    losses = {"failed": "samples failed", "unparsed": "answers unparsed", "excluded": "answers unmarked"}
    for count, what in losses.items():
        notes += [f"{row.folder}: {getattr(row, count)} {what}" for row in lines.values() if getattr(row, count)]
    notes += notes_on([replace(row, note=row.note and f"{row.folder}: {row.note}") for row in lines.values()])
    return Report(tuple(grid for grid in grids if grid.rows), tuple(lines.values()), tuple(notes))


def _labels(results: Sequence[Result]) -> dict[Path, str]:
    """A method's name, with its fields where a table would hold several of that name."""
    places = {run.path: (run.settings["model"], run.task.preset, run.method) for run in results}
    several = Counter(place for place, _ in {(places[run.path], run.fields) for run in results})
    return {run.path: f"{run.method} {run.fields}" if several[places[run.path]] > 1 else run.method for run in results}


def _scores(lines: Mapping[Key, Line], title: str) -> Table:
    """Costs, and the figure of each task with the model's best one marked."""
    methods, tasks = _methods(lines), _tasks(lines)
    costs = {key: _costs([line for (*row, _), line in lines.items() if tuple(row) == key]) for key in methods}
    largest = max((flops for flops, *_ in costs.values() if flops is not None), default=0.0)
    unit, scale = ("TFLOPs", 1e12) if largest >= 1e11 else ("GFLOPs", 1e9)
    header = ("model", "method", f"{unit} (Eq. 10)", "ratio", "exact ratio", *(_head(lines, task) for task in tasks))
    rows = []
    for model, method in methods:
        cells = [model, method]
        for i, cost in enumerate(costs[model, method]):
            least = min((others[i] or 0.0 for (m, _), others in costs.items() if m == model), default=0.0)
            text = _number(cost, ".0%") if i else _number(cost and cost / scale, ".2f")
            cells.append(f"_{text}_" if cost and cost == least else text)
        for task in tasks:
            column = {key[1]: line for key, line in lines.items() if (key[0], key[2]) == (model, task)}
            best = max((line.value for line in column.values() if line.value is not None), default=None)
            fair = not any(line.note for line in column.values())
            row = column.get(method)
            text = _number(row.value, ".1f", row.low, row.high) if row else _MISSING
            cells.append(f"**{text}**" if row and fair and row.value is not None and row.value == best else text)
        rows.append(tuple(cells))
    return Table(header, rows, title)


def _head(lines: Mapping[Key, Line], task: str) -> str:
    figure = next((line.figure for (*_, name), line in lines.items() if name == task and line.figure), None)
    return f"{task} ({figure})" if figure else task


def _losses(lines: Mapping[Key, Line], title: str) -> Table:
    """Differences to the unpruned run."""
    rows = []
    for model, method in _methods(lines):
        cells = [_MISSING] * len(_tasks(lines))
        for i, task in enumerate(_tasks(lines)):
            line = lines.get((model, method, task))
            if line and line.difference is not None and line.p is not None:
                difference = _number(line.difference, "+.1f", line.difference_low, line.difference_high)
                cells[i] = f"{difference}, p = {line.p:.2g}"
        if any(cell != _MISSING for cell in cells):
            rows.append((model, method, *cells))
    return Table(("model", "method", *_tasks(lines)), rows, f"{title}: differences to the unpruned run")


def _tasks(lines: Mapping[Key, Line]) -> list[str]:
    return list(dict.fromkeys(task for *_, task in lines))


def _methods(lines: Mapping[Key, Line]) -> list[tuple[str, str]]:
    """Models in the order given, and of each the unpruned run first, then one method after the other."""
    names = {(model, label): line.method for (model, label, _), line in lines.items()}
    models, methods = list(dict.fromkeys(model for model, _ in names)), list(dict.fromkeys(["none", *names.values()]))
    return sorted(names, key=lambda key: (models.index(key[0]), methods.index(names[key])))


def _costs(lines: Sequence[Line]) -> list[float | None]:
    """Eq. 10's FLOPs and both shares, in the mean over the tasks."""
    means = []
    for measure in ("eq10_flops", "eq10_share", "exact_share"):
        known = [value for line in lines if (value := getattr(line, measure)) is not None]
        means.append(sum(known) / len(known) if known else None)
    return means


def _number(value: float | None, form: str, low: float | None = None, high: float | None = None) -> str:
    """A number, with its interval where that is known."""
    if value is None:
        return _MISSING
    return f"{value:{form}}" if low is None or high is None else f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
