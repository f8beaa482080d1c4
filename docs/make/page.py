"""What the pages share: blocks that are written anew, and tables."""

from __future__ import annotations

import re
from pathlib import Path

from vlmflow.records.table import Table

ROOT = Path(__file__).parents[2]


def put(page: str, name: str, body: str) -> str:
    """The page with one block, from ``<!-- begin NAME -->`` to ``<!-- end NAME -->``, written anew."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    pattern = re.compile(f"{begin}.*?{end}", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise SystemExit(f"the page must have one block {begin} ... {end}")
    return pattern.sub(lambda _: f"{begin}\n{body}\n{end}", page)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table of numbers in Markdown."""
    return Table(header, rows).markdown(numbers=True).rstrip()
