"""One row a sample, kept in a result folder as evaluations keep theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlmflow.records.folder import ROWS, RowFile


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

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Finding:
        """The finding that a row holds."""
        fields: dict[str, Any] = {**record, "images": tuple(record["images"])}
        return cls(**fields)


def findings_of(folder: Path) -> RowFile[Finding]:
    """The rows of an experiment's folder."""
    return RowFile(folder / ROWS, asdict, Finding.from_record)
