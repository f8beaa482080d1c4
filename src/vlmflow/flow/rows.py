"""A study's rows: what was found of each sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vlmflow.records.folder import ROWS, Folder, RowFile


@dataclass(frozen=True)
class StudyRow:
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

    def to_dict(self) -> dict[str, Any]:
        """The row in JSON's own types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> StudyRow:
        """The row that ``to_dict`` wrote."""
        fields: dict[str, Any] = {**record, "images": tuple(record["images"])}
        return cls(**fields)


def study_rows_of(folder: Folder) -> RowFile[StudyRow]:
    """A study's rows."""
    return RowFile(folder.path / ROWS, StudyRow)
