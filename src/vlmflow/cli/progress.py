"""Progress on stderr for commands that take minutes or days and go on where they stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from vlmflow.cli.output import err_console, refusals

if TYPE_CHECKING:
    from vlmflow.evaluate.on_ray import Loading, Pool
    from vlmflow.evaluate.runner import Job, Progress, SampleRow
    from vlmflow.tasks import Sample


def bars() -> Bars:
    """Progress with rate and time left, on stderr."""
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
        console=err_console,
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
            progress.console.print(f"{row.id} failed: {row.failure}", highlight=False)
        each = (time.perf_counter() - start) / (done - before)
        rate = f"{1 / each:.1f} a second" if each < 1 else f"{each:.1f} s each"
        pace = [rate, f"{timedelta(seconds=round(each * (total - done)))} left"]
        progress.update(bar, completed=done, pace=", ".join([*pace, f"{failed} failed"] if failed else pace))

    return follow


def do_job(
    job_for: Callable[[Sequence[bool]], Job[Any]],
    loading: Loading,
    out: Path,
    on_ray: AbstractContextManager[Pool] | None,
    *,
    batch_size: int,
    samples: Sequence[Sample],
    title: str,
) -> dict[str, Any]:
    """``vlmflow.evaluate.launch`` with its progress on stderr; the summary, which torchrun's first process has.

    The others end here.
    """
    from vlmflow.evaluate.launch import launch

    with refusals(), stoppable(), bars() as progress:
        follow = show(progress, title)
        summary = launch(job_for, loading, out, on_ray, batch_size=batch_size, samples=samples, progress=follow)
    if summary is None:
        raise typer.Exit
    return summary


@contextmanager
def stoppable() -> Iterator[None]:
    """Say what to do after Ctrl-C or SIGTERM, which ``vlmflow.__main__`` turns into an exit."""
    try:
        yield
    except SystemExit as end:
        end.add_note("the same command continues from here")
        raise
