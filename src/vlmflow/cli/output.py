"""What commands print: results on stdout, with ``--json`` only these; remarks and refusals on stderr."""

from __future__ import annotations

import codecs
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.box import SIMPLE_HEAD, Box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from vlmflow.records import table as records

console, err_console = (Console(stderr=stderr, markup=False, emoji=False) for stderr in (False, True))
NO_PICTURE = "no picture: where this model's image tokens lie in their images cannot be told"
_LINES = Box(str(SIMPLE_HEAD), ascii=True)  # rich has no such box for terminals without "─", which is printed as "-"
_PLAIN = str.maketrans("→─✓✗“”…", '>-+-"".')


def degrade() -> None:
    """Print a simpler character, of one column too, or a question mark, where a terminal or file lacks one."""
    codecs.register_error("vlmflow", _simpler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="vlmflow")


def _simpler(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)  # these are streams to write on
    return error.object[error.start : error.end].translate(_PLAIN).encode("ascii", "replace").decode(), error.end


def only_json(wanted: bool) -> bool:
    """Leave stdout to the record, and let tables and the like go to stderr: the callback of ``--json``."""
    console.stderr = wanted
    return wanted


def print_json(record: Any) -> None:
    """A record in one line, on stdout."""
    typer.echo(json.dumps(record))


def say(text: str) -> None:
    """Print a text as it stands, with the tables."""
    console.print(text, highlight=False, soft_wrap=True)


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
    err_console.print(text, highlight=False, soft_wrap=True)


def plain_table(*columns: str) -> Table:
    """A table without boxes, for terminals and files alike; what is too wide is broken, never cut."""
    headers = [Column(column, overflow="fold") for column in columns]
    return Table(*headers, box=_LINES, pad_edge=False, padding=(0, 1, 0, 0))


def print_table(table: records.Table) -> None:
    """Print a table that is also written to files."""
    shown = plain_table(*table.header)
    shown.title, shown.title_justify = table.title, "left"
    for cells in table.rows:
        shown.add_row(*(Text(str(cell)) for cell in cells))
    console.print(shown)
