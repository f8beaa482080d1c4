"""An evaluation's rows: what became of each sample, and the answers that a task's figure is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmflow.records.files import RecordError, read_json
from vlmflow.records.folder import ROWS, VERDICTS, Folder, RowFile
from vlmflow.records.schema import from_json
from vlmflow.tasks import Outcome, Picture, Sample


@dataclass(frozen=True)
class Row:
    """A sample's answer, with what it cost.

    ``image_tokens`` gives, by layer, how many image tokens went on from there; ``tokens`` the prompt's tokens, of which
    ``question_tokens`` follow the last image; ``cost`` the pruned prefill's figures, and their shares of the unpruned
    one's, None for a model whose widths are not known. ``failure`` says why there is no answer.
    """

    sample: Sample
    prompt: str
    answer: str = ""
    parsed: str | None = None
    score: float | None = None
    answer_tokens: int = 0
    tokens: int = 0
    question_tokens: int = 0
    image_tokens: Mapping[int, int] = field(default_factory=dict)
    cost: Mapping[str, Any] | None = None
    failure: str | None = None

    @property
    def id(self) -> str:
        """The sample's id."""
        return self.sample.id

    @property
    def shape(self) -> tuple[int, int, int]:
        """What a prefill's cost hangs on: image tokens, text tokens, and those of them that follow the last image."""
        image = self.image_tokens[0]
        return image, self.tokens - image, self.question_tokens

    def by_layer(self, n_layers: int) -> list[int]:
        """How many image tokens entered each layer."""
        return [self.image_tokens[max(n for n in self.image_tokens if n <= layer)] for layer in range(n_layers)]

    def outcome(self, verdict: tuple[float, ...] | None = None) -> Outcome:
        """What the task's figure is made from."""
        return Outcome(self.sample, self.answer, self.parsed, self.score, verdict)

    def to_dict(self) -> dict[str, Any]:
        """The row in JSON's types, with what of the sample the figures need."""
        sample = self.sample
        held = {
            "images": [picture.name for picture in sample.images],
            "choices": list(sample.choices),
            "right": sample.answer,
            "references": list(sample.references),
            "group": sample.group,
        }
        kept = {name: value for name, value in held.items() if value}
        if self.failure is not None:
            return {"id": sample.id, "prompt": self.prompt, "failed": self.failure, "sample": kept}
        record = {name: getattr(self, name) for name in _Written.__dataclass_fields__}
        record["image_tokens"] = {str(layer): count for layer, count in self.image_tokens.items()}
        return {"id": sample.id, **record, "sample": kept}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Row:
        """The row that ``to_dict`` wrote."""
        held = record["sample"]
        sample = Sample(
            id=record["id"],
            images=tuple(Picture(name, b"") for name in held.get("images", ())),
            choices=tuple(held.get("choices", ())),
            answer=held.get("right", ""),
            references=tuple(held.get("references", ())),
            group=held.get("group", ""),
        )
        if "failed" in record:
            return cls(sample, record["prompt"], failure=record["failed"])
        written = from_json(_Written, record, "a row")
        if written.tokens and 0 not in written.image_tokens:
            raise RecordError("a row: image_tokens must say how many entered layer 0")
        return cls(sample, **vars(written))


@dataclass(frozen=True)
class _Written:
    """A row's fields as they are written, in this order; of ``image_tokens`` the layers as text."""

    prompt: str
    answer: str
    parsed: str | None
    score: float | None
    answer_tokens: int
    tokens: int
    question_tokens: int
    image_tokens: dict[int, int]
    cost: dict[str, Any] | None


def rows_of(folder: Folder) -> RowFile[Row]:
    """An evaluation's rows."""
    return RowFile(folder.path / ROWS, Row)


def verdicts_of(folder: Folder) -> dict[str, Any] | None:
    """The judge and its verdicts, None where no judge has marked the answers."""
    path = folder.path / VERDICTS
    if not path.is_file():
        return None
    record = read_json(path)
    if not isinstance(record.get("verdicts"), dict) or not isinstance(record.get("judge"), dict):
        raise RecordError(f"{path}: holds no judge's verdicts; take it away, and have the answers marked again")
    return record


def outcomes_of(folder: Folder) -> list[Outcome]:
    """The answers with their scores and marks; samples that failed are left out."""
    verdicts = (verdicts_of(folder) or {"verdicts": {}})["verdicts"]
    marks = {key: tuple(verdict["marks"]) for key, verdict in verdicts.items() if verdict["marks"] is not None}
    return [row.outcome(marks.get(key)) for key, row in rows_of(folder).read().items() if row.failure is None]
