"""Every method at every budget on one task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmflow.evaluate.budgets import with_budget
from vlmflow.evaluate.evaluation import Evaluation
from vlmflow.evaluate.runner import Progress, run
from vlmflow.evaluate.tables import COSTS, Result, budget_grid, group_grid, line_of, notes_on, table_of
from vlmflow.models import VLM
from vlmflow.pruners import Pruner, Task, Unpruned, find_pruners
from vlmflow.pruners.outside import code_of
from vlmflow.records.files import RecordError, write_json, write_text
from vlmflow.records.schema import Line, SweepRecord, to_json
from vlmflow.records.table import Table
from vlmflow.tasks import Sample

BUDGETS = (
    "A budget is a method's mean number of image tokens entering a layer, as a share of all image tokens; every method "
    "is set to it by the share it drops, vtw by the layer. The columns after it say what was reached."
)


@dataclass(frozen=True)
class Cell:
    """A method at a budget (None: the unpruned run), or why the method cannot give it."""

    name: str
    budget: float | None
    pruner: Pruner | None
    refusal: str = ""

    @property
    def folder(self) -> str:
        """Its folder's name."""
        return self.name if self.budget is None else f"{self.name}-{self.budget:g}"


def plan(
    methods: Sequence[str | type[Pruner]],
    budgets: Sequence[float],
    n_layers: int,
    preset: Task,
    attends: Sequence[bool] = (),
) -> list[Cell]:
    """The cells of a sweep, the unpruned run first.

    Raises:
        RecordError: no method but none, or no cell that can be run.
        ValueError: unknown methods, or two of one name.
    """
    cells = [Cell(Unpruned.name, None, Unpruned())]
    for method in find_pruners(methods):
        for budget in dict.fromkeys(budgets) if method is not Unpruned else ():
            try:
                cells.append(Cell(method.name, budget, with_budget(method, budget, n_layers, preset, attends)))
            except ValueError as error:
                cells.append(Cell(method.name, budget, None, str(error)))
    if all(cell.pruner is None for cell in cells[1:]):
        raise RecordError(cells[1].refusal if cells[1:] else "a sweep needs a method beside none, and a budget")
    return cells


@dataclass(frozen=True)
class Swept:
    """What came of a sweep: a line a cell, and the tables of them; nothing is written yet."""

    task: str
    lines: list[Line]
    by_part: Table | None
    settings: dict[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """What ``sweep.json`` holds."""
        return to_json(SweepRecord(self.settings, self.lines))

    def write(self, out: Path) -> list[str]:
        """Write the table in three formats; the files' names.

        Raises:
            RecordError: a place that cannot be written to, or is full.
        """
        write_json(out / "sweep.json", self.record)
        write_text(out / "sweep.csv", table_of(self.lines).csv())
        write_text(out / "sweep.md", self._markdown())
        return ["sweep.md", "sweep.csv", "sweep.json"]

    def _markdown(self) -> str:
        common = self.settings
        built_with = ", ".join(f"{name} {version}" for name, version in common["versions"].items())
        what = (
            f"Model {common['model']} ({common['dtype']}, weights {common['weights'][:12]}), "
            f"{common['samples']['count']} samples, prompt style {common['prompt']}, answer rule {common['rule']}, "
            f"greedy, at most {common['max_new_tokens']} new tokens; {built_with}."
        )
        notes = "".join(f"- {note}\n" for note in notes_on(self.lines))
        by_part = self.by_part.markdown() if self.by_part else ""
        by_budget = budget_grid(self.lines, self.task).markdown()
        parts = [by_budget, notes, by_part, what, BUDGETS, COSTS, "![Figure against FLOPs](pareto.png)"]
        return "\n\n".join(part.strip() for part in parts if part) + "\n"


def sweep(
    vlm: VLM,
    evaluation: Evaluation,
    cells: Sequence[Cell],
    out: Path,
    *,
    samples: Sequence[Sample],
    batch_size: int = 8,
    progress: Callable[[str], Progress],
) -> Swept:
    """Evaluate each cell in its folder in ``out``, go on where it stopped; what came of all.

    ``evaluation``'s pruner is replaced by each cell's; ``progress`` follows a cell by its title.

    Raises:
        RecordError: a cell's folder holds another run.
        ValueError: a pruner or model that do not fit (see ``attach``).
    """
    results: dict[str, Result] = {}
    for number, cell in enumerate(cells, 1):
        if cell.pruner is None:
            continue
        origin = "no pruning" if cell.budget is None else f"budget {cell.budget:g} of the image tokens a layer"
        origin = "; ".join(filter(None, (code_of(type(cell.pruner)), origin)))
        job = replace(evaluation, pruner=cell.pruner, pruner_from=origin)
        folder, title = out / cell.folder, f"{cell.folder} ({number}/{len(cells)})"
        run(vlm, job, folder, batch_size=batch_size, samples=samples, progress=progress(title))
        results[cell.folder] = Result.read(folder)
    baseline = results[cells[0].folder]
    lines = [
        replace(line_of(results[cell.folder], baseline, cell.budget), folder=cell.folder)
        if cell.pruner
        else Line(vlm.name, evaluation.task.name, cell.name, "", cell.budget, cell.folder, note=cell.refusal)
        for cell in cells
    ]
    title = evaluation.task.title
    return Swept(title, lines, group_grid(list(results.items()), f"{title}: by part"), baseline.common)
