"""One row a sample, kept in a result folder as evaluations keep theirs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlmflow.evaluate.folder import ROWS, EvaluationError, write_text


@dataclass(frozen=True)
class Finding:
    """What was found of one sample.

    ``blank_answer`` is what the model said to a blank picture; where that was right, the sample is ``dropped`` and
    nothing else is known of it. ``target`` is the answer's first token, ``right`` whether it was the likeliest one
    with the image, ``lengths`` the tokens of each segment, ``found`` the experiment's own numbers. ``failure`` says
    why there is nothing.
    """

    id: str
    images: tuple[str, ...]
    blank_answer: str = ""
    dropped: bool = False
    target: int = -1
    right: bool = False
    lengths: Mapping[str, int] = field(default_factory=dict)
    found: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None

    @property
    def kept(self) -> bool:
        """Whether it counts."""
        return not self.dropped and self.failure is None

    def line(self) -> str:
        """The row as it stands in a file."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def read(folder: Path) -> dict[str, Finding]:
    """The rows of a folder by sample id, of two the later; a last line without its end is none.

    Raises:
        EvaluationError: a broken line, by its number.
    """
    path = folder / ROWS
    if not path.is_file():
        return {}
    findings: dict[str, Finding] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            finding = Finding(**record | {"images": tuple(record["images"])})
        except (ValueError, KeyError, TypeError):
            raise EvaluationError(
                f"{path}, line {number}: not a row of this experiment; take the line out, and its sample is seen again"
            ) from None
        findings[finding.id] = finding
    return findings


def append(folder: Path, finding: Finding) -> None:
    """Write a row so that a killed process, or machine, does not lose it."""
    with (folder / ROWS).open("ab") as file:
        file.write(finding.line().encode())
        file.flush()
        os.fsync(file.fileno())


def put_in_order(folder: Path, ids: Sequence[str]) -> list[Finding]:
    """The rows in the samples' order, one a sample; so they stand in the file from now on."""
    findings = read(folder)
    ordered = [findings[key] for key in ids]
    text = "".join(finding.line() for finding in ordered)
    if (folder / ROWS).read_text(encoding="utf-8") != text:
        write_text(folder / ROWS, text)
    return ordered
