"""What commands print: results on stdout, remarks and refusals on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmflow.records import table as records

console, err_console = Console(), Console(stderr=True)
NO_PICTURE = "no picture: where this model's image tokens lie in their images cannot be told"


@contextmanager
def refusals() -> Iterator[None]:
    """Turn an error that the user can mend into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename is not None:
            text = f"{error.filename2 or error.filename}: {error.strerror}"  # without the number and the quotes
        typer.echo(f"vlmflow: {' '.join(text.removeprefix('vlmflow: ').split())}", err=True)
        raise typer.Exit(2) from error


def remark(text: str) -> None:
    """Say something on stderr as it stands, whatever characters are in it."""
    err_console.print(text, highlight=False, markup=False, soft_wrap=True)


def plain_table(*columns: str) -> Table:
    """A table without boxes, for terminals and files alike."""
    return Table(*columns, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def print_table(table: records.Table) -> None:
    """Print a table that is also written to files."""
    shown = plain_table(*table.header)
    shown.title, shown.title_justify = table.title, "left"
    for cells in table.rows:
        shown.add_row(*(Text(str(cell)) for cell in cells))
    console.print(shown)
