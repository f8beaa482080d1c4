"""The command line; nobody imports it."""

from __future__ import annotations

import os
import warnings
from typing import Annotated, Any

import typer

from vlmflow import __version__
from vlmflow.cli.bench import bench
from vlmflow.cli.convert import convert
from vlmflow.cli.cost import cost
from vlmflow.cli.evaluate import evaluate, report, sweep
from vlmflow.cli.flow import flow
from vlmflow.cli.groups import OnceEach, with_groups
from vlmflow.cli.lists import models, pruners
from vlmflow.cli.output import degrade, only_json
from vlmflow.cli.run import demo, run
from vlmflow.cli.samples import samples

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="See where visual information flows in a multimodal LLM, and prune the image tokens it no longer needs.",
)
app.command("eval", cls=OnceEach)(with_groups(evaluate))
for command in (demo, run, samples, cost, bench, sweep, report, convert, pruners, models):
    app.command(cls=OnceEach)(with_groups(command))
app.add_typer(flow, name="flow")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error comes from, as VLMFLOW_TRACEBACK=1 does.")
    ] = False,
) -> None:
    """Options that need no command."""
    only_json(False)  # what an earlier command of this process wanted
    if traceback:
        os.environ["VLMFLOW_TRACEBACK"] = "1"  # for workers too
    if version:
        typer.echo(f"vlmflow {__version__}")
        raise typer.Exit


def main() -> None:
    """Quiet libraries, then the command (``vlmflow.__main__`` is the entry point)."""
    degrade()
    for library in ("TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    warnings.formatwarning = _format_warning
    app()


def _format_warning(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
    """One line for what we warn of, and where in the code it stands for what others do."""
    ours = category.__module__.startswith("vlmflow.")
    return f"vlmflow: {message}\n" if ours else _ORIGINAL(message, category, *place, **line)


_ORIGINAL = warnings.formatwarning
