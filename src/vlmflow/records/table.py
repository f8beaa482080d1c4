"""A table of cells, written as Markdown or CSV; the command line prints it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; every cell is shown as its text."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""

    def markdown(self, numbers: bool = False) -> str:
        """The table in Markdown, below its title if it has one; ``numbers`` stand to the right of all but column 0."""
        rule = ["---", *["---:" if numbers else "---"] * (len(self.header) - 1)]
        lines = [self.header, rule, *self.rows]
        escaped = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
        body = "\n".join(f"| {' | '.join(cells)} |" for cells in escaped) + "\n"
        return f"**{self.title}**\n\n{body}" if self.title else body

    def csv(self) -> str:
        """The table in CSV, without its title; None is an empty cell."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        return text.getvalue()
