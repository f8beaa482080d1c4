"""``vlmflow eval``, ``sweep`` and ``report``: one method on a task, all at equal budgets, tables of results."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from vlmflow.cli.common import (
    DeviceOption,
    DtypeOption,
    ModelOption,
    PrunerOption,
    PrunersOption,
    SetOption,
    absolute,
    load_model,
    notes,
    out,
    parse_settings,
    plain_table,
    print_table,
    pruners_named,
    refusals,
)
from vlmflow.evaluate.judge import Judge
from vlmflow.pruners import PRUNERS, Unpruned, find_pruner, parse_fields
from vlmflow.tasks import TASKS, Sample, Source, Task, TaskError

if TYPE_CHECKING:
    from vlmflow.evaluate.launch import RayWorkers
    from vlmflow.evaluate.runner import Progress, SampleRow
    from vlmflow.records.schema import Line

METHODS = ",".join(name for name, method in PRUNERS.items() if method is not Unpruned)
TaskOption = Annotated[str, typer.Option("--task", "-t", help=f"One of {', '.join(TASKS)}.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="How many samples, from the first on; default: all.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Samples at once, padded on the left.")]
StyleOption = Annotated[str | None, typer.Option(help="The prompt style; default: paper for its tasks, else plain.")]
RuleOption = Annotated[str | None, typer.Option(help="The answer rule; default: the task's first.")]
TokensOption = Annotated[int | None, typer.Option(min=1, help="The longest answer, in tokens; default: the task's.")]
SourceOption = Annotated[Path | None, typer.Option(help="A local copy of the data in an official format.")]
ImagesOption = Annotated[Path | None, typer.Option(help="The local copy's images, where they do not lie beside it.")]
HubOption = Annotated[str | None, typer.Option(help="Another hub data set, or folder of one, than the task's.")]
ConfigOption = Annotated[str | None, typer.Option(help="The hub data set's configuration.")]
SplitOption = Annotated[str | None, typer.Option(help="Another split than the task's.")]
RevisionOption = Annotated[str | None, typer.Option(help="The hub data set's revision.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for results; one that was begun is gone on with.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON line last.")]
EngineOption = Annotated[str, typer.Option(help="Who answers: local, this process or torchrun's; or ray.")]
WorkersOption = Annotated[int | None, typer.Option(help="With ray: so many models answer; default: 1.")]
GpusOption = Annotated[float | None, typer.Option(help="With ray: GPUs for each; default: one, if there are any.")]
AddressOption = Annotated[
    str | None, typer.Option(help="With ray: a cluster's host:port, or auto; default: this machine alone.")
]


def evaluate(
    task: TaskOption,
    out_dir: OutOption,
    model: ModelOption = "pico",
    pruner: PrunerOption = "himap",
    set_: SetOption = [],  # noqa: B006 (typer reads it as a default)
    limit: LimitOption = None,
    batch_size: BatchOption = 8,
    prompt_style: StyleOption = None,
    rule: RuleOption = None,
    max_new_tokens: TokensOption = None,
    source: SourceOption = None,
    images: ImagesOption = None,
    hub: HubOption = None,
    config: ConfigOption = None,
    split: SplitOption = None,
    revision: RevisionOption = None,
    judge: Annotated[str | None, typer.Option(help="A judge's model name, for open answers.")] = None,
    judge_url: Annotated[str | None, typer.Option(help="The judge's endpoint; default: OpenAI's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the judge's requests; send none.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    engine: EngineOption = "local",
    workers: WorkersOption = None,
    gpus_per_worker: GpusOption = None,
    ray_address: AddressOption = None,
    json_: JsonOption = False,
) -> None:
    """Evaluate a model on a task with its image tokens pruned; started again it goes on where it stopped.

    The pruner himap takes Table 3's fields for the task.
    """
    with refusals():
        settings = parse_settings(set_)
        parse_fields(pruner, settings)  # wrong names, before anything is loaded
        name = find_pruner(pruner).name
        chosen = _task(task)
        marker = _marker(chosen, judge, judge_url, dry_run, out_dir)
        on_ray = ray_workers(engine, workers, gpus_per_worker, ray_address)
        where = Source(absolute(source), absolute(images), hub, config, split, revision)
        check_out(out_dir)
        samples = _samples(chosen, where, prompt_style, rule, limit)
    from vlmflow.evaluate.budgets import for_task
    from vlmflow.evaluate.evaluation import Evaluation
    from vlmflow.evaluate.launch import launch
    from vlmflow.evaluate.marking import mark, write_requests
    from vlmflow.evaluate.on_ray import Loading

    def evaluation(n_layers: int) -> Evaluation:
        method, origin = for_task(pruner, settings, chosen.preset, n_layers)
        return Evaluation(chosen, method, origin, where, prompt_style, rule, limit, max_new_tokens)

    with refusals(), stoppable(), bars() as progress:
        loading, bar = Loading.named(model, device, dtype), show(progress, f"{task} {name}")
        summary = launch(evaluation, loading, out_dir, on_ray, batch_size=batch_size, samples=samples, progress=bar)
    if summary is None:
        return  # torchrun's first process has it
    with refusals(), stoppable():
        done = evaluation(summary["settings"]["layers"])
        if marker is not None and dry_run:
            count = write_requests(out_dir, done, marker, samples)
            notes.print(f"wrote {count} requests to {out_dir / 'requests.jsonl'}")
        elif marker is not None:
            summary = mark(out_dir, done, marker, samples)
    _print_summary(summary, chosen)
    typer.echo(f"wrote {out_dir / 'summary.json'}")
    if json_:
        typer.echo(json.dumps(summary))
    if not summary["samples"]["answered"]:
        notes.print("every sample failed")
        raise typer.Exit(1)


def sweep(
    task: TaskOption,
    out_dir: OutOption,
    model: ModelOption = "pico",
    pruners: PrunersOption = METHODS,
    budgets: Annotated[
        str, typer.Option(help="Mean image tokens entering a layer, as shares of all, with commas between.")
    ] = "0.5,0.33,0.2",
    limit: LimitOption = None,
    batch_size: BatchOption = 8,
    prompt_style: StyleOption = None,
    rule: RuleOption = None,
    max_new_tokens: TokensOption = None,
    source: SourceOption = None,
    images: ImagesOption = None,
    hub: HubOption = None,
    config: ConfigOption = None,
    split: SplitOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Evaluate methods at equal budgets on a task, beside the unpruned run: a table and a picture."""
    with refusals():
        methods = pruners_named(pruners)
        shares = _shares(budgets)
        chosen = _task(task)
        if chosen.rubric is not None:
            raise ValueError(f"{task} needs a judge; evaluate its methods one by one with eval --judge")
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise ValueError("sweep runs in one process; under torchrun evaluate its methods one by one with eval")
        where = Source(absolute(source), absolute(images), hub, config, split, revision)
        check_out(out_dir)
        samples = _samples(chosen, where, prompt_style, rule, limit)
    vlm = load_model(model, device, dtype)
    from vlmflow.evaluate.evaluation import Evaluation
    from vlmflow.evaluate.sweep import Cell, plan, sweep_grid
    from vlmflow.evaluate.sweep import sweep as evaluate_cells

    with refusals(), stoppable():
        cells = plan(methods, shares, vlm.n_layers, chosen.preset)
        asked = Evaluation(chosen, Unpruned(), "", where, prompt_style, rule, limit, max_new_tokens)
        with bars() as progress:

            def shown(number: int, cell: Cell) -> Progress:
                return show(progress, f"{cell.folder} ({number + 1}/{len(cells)})")

            lines = evaluate_cells(vlm, asked, cells, out_dir, samples=samples, batch_size=batch_size, progress=shown)
        print_table(sweep_grid(lines, chosen.title, wide=False))
        for line in lines:
            if line.note:
                notes.print(line.note, highlight=False, markup=False)
        written = ["sweep.md", "sweep.csv", "sweep.json"]
        if _draw(lines, out_dir / "pareto.png", f"{chosen.title}, {model}"):
            written.append("pareto.png")
    typer.echo(f"wrote {', '.join(written)} to {out_dir}")
    if json_:
        typer.echo(json.dumps(json.loads((out_dir / "sweep.json").read_text(encoding="utf-8"))))


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
        results, left_out = find_results(folders)
        made = make_report(results)
        record = to_json(ReportRecord(list(made.lines), list(made.notes)))
        if out_dir is not None:
            write_text(out_dir / "report.md", made.markdown())
            write_text(out_dir / "report.csv", table_of(made.lines).csv())
            write_json(out_dir / "report.json", record)
    for path, what in left_out.items():
        notes.print(f"left out, as it is {what}: {path}", highlight=False, markup=False)
    for grid in made.grids:
        print_table(grid)
    for note in made.notes:
        out.print(note, highlight=False, markup=False)
    if out_dir is not None:
        typer.echo(f"wrote report.md, report.csv, report.json to {out_dir}")
    if json_:
        typer.echo(json.dumps(record))


# -- what the three share


def bars() -> Bars:
    """Progress with rate and time left, on stderr."""
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
        console=notes,
    )


def show(progress: Bars, title: str) -> Progress:
    """A bar that follows a run; samples that fail are told of above it."""
    bar, start, before, failed = TaskID(0), 0.0, 0, 0

    def follow(done: int, total: int, row: SampleRow | None) -> None:
        nonlocal bar, start, before, failed
        if row is None:  # not before the folder has been accepted
            bar = progress.add_task(title, total=total, completed=done, pace="")
            start, before = time.perf_counter(), done
            return
        if row.failure is not None:
            failed += 1
            progress.console.print(f"{row.id} failed: {row.failure}", highlight=False, markup=False)
        each = (time.perf_counter() - start) / (done - before)
        rate = f"{1 / each:.1f} a second" if each < 1 else f"{each:.1f} s each"
        pace = [rate, f"{timedelta(seconds=round(each * (total - done)))} left"]
        progress.update(bar, completed=done, pace=", ".join([*pace, f"{failed} failed"] if failed else pace))

    return follow


@contextmanager
def stoppable() -> Iterator[None]:
    """Say what to do after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        notes.print("stopped; the same command goes on from here")
        raise typer.Exit(130) from None


def _task(name: str) -> Task:
    if name not in TASKS:
        raise TaskError(f"unknown task {name!r}; choose from {', '.join(TASKS)}")
    return TASKS[name]


def _marker(task: Task, name: str | None, url: str | None, dry_run: bool, out_dir: Path) -> Judge | None:
    """The judge, if one is named; what would keep it from marking is refused before a model is loaded."""
    if name is None:
        given = {"--judge-url": url is not None, "--dry-run": dry_run}
        if names := [option for option, value in given.items() if value]:
            raise ValueError(f"{names[0]} is for a judge; name it with --judge")
        return None
    task.marked_by()
    judge = Judge(name, out_dir / "judge", url)
    if not dry_run:
        judge.check()
    return judge


def _samples(task: Task, source: Source, style: str | None, rule: str | None, limit: int | None) -> list[Sample]:
    """The samples; a wrong source, style or rule is refused before a model is loaded."""
    samples = task.samples(source, limit)
    task.prompt(samples[0], style)
    task.parse("", samples[0], rule)
    return samples


def ray_workers(engine: str, workers: int | None, gpus: float | None, address: str | None) -> RayWorkers | None:
    """Who answers with ``--engine ray``; None where Ray has no part."""
    if engine not in ("local", "ray"):
        raise ValueError(f"--engine must be local or ray, got {engine!r}")
    if engine == "local":
        given = {"--workers": workers, "--gpus-per-worker": gpus, "--ray-address": address}
        if names := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{names[0]} goes with --engine ray")
        return None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError("--engine ray starts its own workers; run it without torchrun")
    from vlmflow.evaluate.launch import RayWorkers

    return RayWorkers(1 if workers is None else workers, gpus, address)


def check_out(folder: Path) -> None:
    """Refuse a file where a folder is wanted, before a model is loaded."""
    if folder.is_file():
        raise ValueError(f"--out wants a folder, and {folder} is a file")


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--budgets wants shares with commas between, such as 0.5,0.2, got {text!r}") from None
    if any(not 0 < share < 1 for share in shares):
        raise ValueError(f"--budgets wants shares above 0 and below 1, got {text!r}")
    return shares


def _print_summary(summary: dict[str, Any], task: Task) -> None:
    metric, cost, counts = summary["metric"], summary["cost"], summary["samples"]
    table = plain_table("", task.title)
    if metric:
        value = "none yet: no answer is marked (--judge)" if metric["value"] is None else f"{metric['value']:.2f}"
        low_high = metric["interval"] and " [{:.2f}, {:.2f}]".format(*metric["interval"])
        table.add_row(metric["figure"], f"{value}{low_high or ''}")
    table.add_row("answered", f"{counts['answered']} of {counts['asked']}, {counts['failed']} failed")
    if metric:
        table.add_row("unparsed", f"{metric['unparsed']}, counted as wrong")
        if task.rubric:
            table.add_row("unmarked", f"{metric['excluded']}, left out")
    pruner = ", ".join(f"{k}={v}" for k, v in summary["settings"]["pruner"].items() if k != "name")
    table.add_row("pruner", f"{summary['settings']['pruner']['name']} {pruner} ({summary['settings']['pruner_from']})")
    if cost:
        names = {
            "mean_image_tokens": "image tokens a layer",
            "paper_flops": "FLOPs, Eq. 10 (image only)",
            "exact_flops": "FLOPs, exact (with text)",
            "kv_bytes": "KV cache",
        }
        for measure, name in names.items():
            table.add_row(name, f"{cost['shares'][measure]:.1%} of unpruned")
    out.print(table)


def _draw(lines: Sequence[Line], path: Path, title: str) -> bool:
    """The Pareto picture, where figures and costs are known."""
    from vlmflow.figures.comparison import Point, pareto

    def point(line: Line, share: float | None) -> Point | None:
        if share is None or line.value is None or line.low is None or line.high is None:
            return None
        return Point(100 * share, line.value, line.low, line.high)

    unpruned = point(lines[0], lines[0].exact_share)
    if unpruned is None:
        return False
    panels: dict[str, dict[str, list[Point]]] = {}
    for label, measure in (
        ("FLOPs by Eq. 10 (image tokens only), % of unpruned", "eq10_share"),
        ("FLOPs counted exactly (with text), % of unpruned", "exact_share"),
    ):
        for line in lines[1:]:
            if (found := point(line, getattr(line, measure))) is not None:
                panels.setdefault(label, {}).setdefault(line.method, []).append(found)
    pareto(path, panels, unpruned, lines[0].figure or "figure", title)
    return True
