"""``vlmflow eval``, ``sweep`` and ``report``: one method on a task, all at equal budgets, tables of results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmflow.cli.options import (
    JsonOption,
    JudgeOptions,
    LauncherOptions,
    LoadingOptions,
    ModelOption,
    OutOption,
    PrunerOptions,
    PrunersOption,
    RunOptions,
    SourceOptions,
    TaskOption,
    check_folder,
    pruners_named,
    task_named,
    under_torchrun,
)
from vlmflow.cli.output import console, plain_table, print_json, print_table, refusals, remark, say
from vlmflow.cli.progress import bars, do_job, show, stoppable
from vlmflow.core.statistics import too_few
from vlmflow.evaluate.budgets import for_task
from vlmflow.evaluate.judge import mark, why_unmarked, write_requests
from vlmflow.pruners import PRUNERS, Unpruned, find_pruner
from vlmflow.tasks import Task

if TYPE_CHECKING:
    from vlmflow.records.schema import Line

SHARES = {
    "mean_image_tokens": "image tokens a layer",
    "paper_flops": "FLOPs, Eq. 10 (image only)",
    "exact_flops": "FLOPs, exact (with text)",
    "kv_bytes": "KV cache",
}
METHODS = ",".join(name for name, method in PRUNERS.items() if method is not Unpruned)


def evaluate(
    *,
    task: TaskOption,
    out_dir: OutOption,
    model: ModelOption = "pico",
    pruner: PrunerOptions,
    run: RunOptions,
    source: SourceOptions,
    judge: JudgeOptions,
    loading: LoadingOptions,
    launcher: LauncherOptions,
    json_: JsonOption = False,
) -> None:
    """Evaluate a model on a task with its image tokens pruned; started again it continues where it stopped.

    The pruner himap takes Table 3's fields for the task.
    """
    with refusals():
        settings = pruner.settings()
        name = find_pruner(pruner.pruner).name
        chosen = task_named(task)
        marker = judge.make(chosen, out_dir)
        load = loading.named(model)
        on_ray = launcher.on_ray(load)
        where = source.source()
        check_folder("--out", out_dir)
        samples = run.samples(chosen, where)
    from vlmflow.evaluate.evaluation import Evaluation

    def evaluation_for(attends: Sequence[bool]) -> Evaluation:
        method, origin = for_task(pruner.pruner, settings, chosen.preset, len(attends), attends)
        return run.evaluation(chosen, where, method, origin)

    size, title = run.batch_size, f"{task} {name}"
    summary = do_job(evaluation_for, load, out_dir, on_ray, batch_size=size, samples=samples, title=title)
    unmarked = None
    if marker is not None:
        with refusals(), stoppable():
            evaluation = evaluation_for([True] * summary["settings"]["layers"])
            if judge.dry_run:
                count = write_requests(out_dir, evaluation, marker, samples)
                remark(f"wrote {count} requests to {out_dir / 'requests.jsonl'}")
            else:
                summary = mark(out_dir, evaluation, marker, samples)
                unmarked = why_unmarked(out_dir)
    _print_summary(summary, chosen)
    say(f"wrote {out_dir / 'summary.json'}")
    if json_:
        print_json(summary)
    if not summary["samples"]["answered"]:
        remark("every sample failed")
        raise typer.Exit(1)
    if unmarked is not None:
        remark(f"the judge has marked no answer ({unmarked}, for most); the same command asks it again")
        raise typer.Exit(1)


def sweep(
    *,
    task: TaskOption,
    out_dir: OutOption,
    model: ModelOption = "pico",
    pruners: PrunersOption = METHODS,
    budgets: Annotated[
        str, typer.Option(help="Mean image tokens entering a layer, as shares of all, with commas between.")
    ] = "0.5,0.33,0.2",
    run: RunOptions,
    source: SourceOptions,
    loading: LoadingOptions,
    json_: JsonOption = False,
) -> None:
    """Evaluate methods at equal budgets on a task, beside the unpruned run: a table and a picture."""
    with refusals():
        methods = pruners_named(pruners)
        shares = _shares(budgets)
        chosen = task_named(task)
        if chosen.rubric is not None:
            raise ValueError(f"{task} needs a judge; evaluate its methods one by one with eval --judge")
        if under_torchrun():
            raise ValueError("sweep runs in one process; under torchrun evaluate its methods one by one with eval")
        where = source.source()
        check_folder("--out", out_dir)
        samples = run.samples(chosen, where)
    from vlmflow.evaluate.sweep import plan
    from vlmflow.evaluate.sweep import sweep as evaluate_cells
    from vlmflow.evaluate.tables import budget_grid, notes_on

    with refusals(), stoppable():
        attends = loading.attends(model)
        cells = plan(methods, shares, len(attends), chosen.preset, attends)
        vlm = loading.load(model)
        evaluation, size = run.evaluation(chosen, where, Unpruned(), ""), run.batch_size
        with bars() as progress:
            follow = partial(show, progress)
            swept = evaluate_cells(vlm, evaluation, cells, out_dir, samples=samples, batch_size=size, progress=follow)
    print_table(budget_grid(swept.lines, chosen.title, wide=False))
    for note in notes_on(swept.lines):
        remark(note)
    if json_:
        print_json(swept.record)
    with refusals():
        written = swept.write(out_dir)
        if _draw(swept.lines, out_dir / "pareto.png", f"{chosen.title}, {model}"):
            written.append("pareto.png")
    say(f"wrote {', '.join(written)} to {out_dir}")


def report(
    folders: Annotated[list[Path], typer.Argument(help="Result folders, or folders above them.")],
    out_dir: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for report.md, report.csv, report.json.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Put results into tables like the paper's Tables 1 and 2, with differences to the unpruned run."""
    from vlmflow.evaluate.tables import find_results, table_of
    from vlmflow.evaluate.tables import report as make_report
    from vlmflow.records.files import write_json, write_text
    from vlmflow.records.schema import ReportRecord, to_json

    with refusals():
        if out_dir is not None:
            check_folder("--out", out_dir)
        results, left_out = find_results(folders)
        made = make_report(results)
        record = to_json(ReportRecord(list(made.lines), list(made.notes)))
    for path, what in left_out.items():
        remark(f"left out, as it is {what}: {path}")
    for grid in made.grids:
        print_table(grid)
    for note in made.notes:
        console.print(note, highlight=False)
    if json_:
        print_json(record)
    if out_dir is not None:
        with refusals():
            write_text(out_dir / "report.md", made.markdown())
            write_text(out_dir / "report.csv", table_of(made.lines).csv())
            write_json(out_dir / "report.json", record)
        say(f"wrote report.md, report.csv, report.json to {out_dir}")


# -- what they print


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--budgets wants shares with commas between, such as 0.5,0.2, got {text!r}") from None
    if any(not 0 < share < 1 for share in shares):
        raise ValueError(f"--budgets wants shares above 0 and below 1, got {text!r}")
    return shares


def _print_summary(summary: dict[str, Any], task: Task) -> None:
    metric, cost, counts, settings = (summary[name] for name in ("metric", "cost", "samples", "settings"))
    table = plain_table("", task.title)
    if metric:
        value = "none yet: no answer is marked (--judge)"
        if metric["value"] is not None:
            value = "{:.2f} [{:.2f}, {:.2f}]".format(metric["value"], *metric["interval"])
        table.add_row(metric["figure"], value)
        table.add_row("over", too_few(metric["images"]) or f"{metric['images']} images")
    table.add_row("answered", f"{counts['answered']} of {counts['asked']}, {counts['failed']} failed")
    if metric:
        table.add_row("unparsed", f"{metric['unparsed']}, counted as wrong")
        if task.rubric:
            table.add_row("unmarked", f"{metric['excluded']}, left out")
    name, *fields = settings["pruner"].items()
    pruner = ", ".join(f"{field}={value}" for field, value in fields)
    table.add_row("pruner", f"{name[1]} {pruner} ({settings['pruner_from']})")
    for measure, label in SHARES.items() if cost else ():
        table.add_row(label, f"{cost['shares'][measure]:.1%} of unpruned")
    console.print(table)


def _draw(lines: Sequence[Line], path: Path, title: str) -> bool:
    """The Pareto picture, where figures and costs are known."""
    from vlmflow.figures.comparison import Point, pareto

    panels: dict[str, dict[str, list[Point]]] = {}
    for label, measure in (
        ("FLOPs by Eq. 10 (image tokens only), % of unpruned", "eq10_share"),
        ("FLOPs counted exactly (with text), % of unpruned", "exact_share"),
    ):
        for line in lines:
            share: float | None = getattr(line, measure)
            if share is not None and line.value is not None and line.low is not None and line.high is not None:
                point = Point(100 * share, line.value, line.low, line.high)
                panels.setdefault(label, {}).setdefault(line.method, []).append(point)
    unpruned = [methods.pop(lines[0].method, None) for methods in panels.values()]
    if not unpruned or unpruned[-1] is None:
        return False
    pareto(path, panels, unpruned[-1][0], lines[0].figure or "figure", title)
    return True
