"""What the commands share: options, refusals, tables, records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmflow.pruners import PRUNERS, Pruner, find_pruners

if TYPE_CHECKING:
    from vlmflow.models import VLM
    from vlmflow.records import table as records

out, notes = Console(), Console(stderr=True)

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Hub id, local folder, or pico, the embedded model.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where the model runs, auto to spread it; default: the first accelerator, or cpu.")
]
DtypeOption = Annotated[str, typer.Option(help="A torch dtype such as bfloat16, or auto for the checkpoint's own.")]
PrunerOption = Annotated[
    str,
    typer.Option(help=f"One of {', '.join(PRUNERS)}, or a class of your own: path/to/file.py:Class, module:Class."),
]
PrunersOption = Annotated[
    str, typer.Option(help="Names with commas between, or classes of your own: file.py:Class, module:Class.")
]
SetOption = Annotated[list[str], typer.Option("--set", help="A field of the pruner, as k1=2; may be repeated.")]


@contextmanager
def refusals() -> Iterator[None]:
    """Turn an error that the user can mend into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"vlmflow: {' '.join(str(error).removeprefix('vlmflow: ').split())}", err=True)
        raise typer.Exit(2) from error


def load_model(name: str, device: str | None, dtype: str, attn: str = "sdpa") -> VLM:
    """Load a model, or leave with one line."""
    from vlmflow.models import load  # torch and transformers take seconds that --help does not need

    with refusals():
        return load(name, device, dtype, attn)


def parse_settings(pairs: Sequence[str]) -> dict[str, str]:
    """``k1=2`` and the like.

    Raises:
        ValueError: no equals sign in one.
    """
    broken = next((pair for pair in pairs if "=" not in pair), None)
    if broken is not None:
        raise ValueError(f"--set wants field=value, such as k1=2, got {broken!r}")
    return {name.strip(): value.strip() for name, _, value in (pair.partition("=") for pair in pairs)}


def pruners_named(text: str) -> list[type[Pruner]]:
    """The methods named with commas between.

    Raises:
        ValueError: one of them is none.
    """
    return find_pruners(name.strip() for name in text.split(",") if name.strip())


def absolute(path: Path | None) -> Path | None:
    """A path that means the same wherever a worker runs."""
    return path and path.resolve()


def plain_table(*columns: str) -> Table:
    """A table without boxes, for terminals and files alike."""
    return Table(*columns, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def print_table(table: records.Table) -> None:
    """Print a table that is also written to files."""
    shown = plain_table(*table.header)
    shown.title, shown.title_justify = table.title, "left"
    for cells in table.rows:
        shown.add_row(*(Text(str(cell)) for cell in cells))
    out.print(shown)
