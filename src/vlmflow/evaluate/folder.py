"""A result folder: settings first, rows as they come, the summary last. Whatever is killed can go on.

``settings.json`` says what is evaluated, ``rows.jsonl`` has one JSON object a sample, ``summary.json`` the figure and
all that is needed to repeat it, ``log.jsonl`` when it ran, where and how long; ``verdicts.json`` a judge's marks.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

from vlmflow.tasks.core import Outcome, Picture, Sample

try:
    import fcntl
except ImportError:  # no such lock on Windows
    fcntl = None

T = TypeVar("T")
SETTINGS, ROWS, SUMMARY, LOG, VERDICTS = "settings.json", "rows.jsonl", "summary.json", "log.jsonl", "verdicts.json"


class EvaluationError(ValueError):
    """An evaluation cannot go on as asked; the message says what to do."""


def versions() -> dict[str, str]:
    """What a result depends on."""
    packages = {name: metadata.version(name) for name in ("vlmflow", "torch", "transformers", "pillow")}
    return packages | {"python": platform.python_version()}


@dataclass(frozen=True)
class RowFile(Generic[T]):
    """A file of JSON objects, one a line and sample, by the sample's ``id``; of two the later counts."""

    path: Path
    to_record: Callable[[T], Mapping[str, Any]]
    from_record: Callable[[Mapping[str, Any]], T]

    def read(self) -> dict[str, T]:
        """The rows by sample id; a last line without its end is none.

        Raises:
            EvaluationError: a broken line, by its number.
        """
        if not self.path.is_file():
            return {}
        rows: dict[str, T] = {}
        for number, line in enumerate(self.path.read_bytes().split(b"\n")[:-1], 1):
            try:
                record = json.loads(line)
                rows[record["id"]] = self.from_record(record)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise EvaluationError(
                    f"{self.path}, line {number}: not a row of this kind of run; take the line out, and its sample is "
                    "done again"
                ) from None
        return rows

    def append(self, rows: Iterable[T]) -> None:
        """Write rows so that a killed process, or machine, has lost at most those of one call."""
        with self.path.open("ab") as file:
            file.write(self._text(rows).encode())
            file.flush()
            os.fsync(file.fileno())

    def put_in_order(self, ids: Sequence[str]) -> list[T]:
        """The rows in the samples' order, one a sample; so they stand in the file from now on."""
        rows = self.read()
        ordered = [rows[key] for key in ids]
        lines = self.path.read_bytes().count(b"\n")
        if list(rows) != list(ids) or lines != len(rows):
            write_text(self.path, self._text(ordered))
        return ordered

    def _text(self, rows: Iterable[T]) -> str:
        return "".join(json.dumps(self.to_record(row), ensure_ascii=False) + "\n" for row in rows)


@dataclass(frozen=True)
class Row:
    """What became of one sample.

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
    image_tokens: Mapping[int, int] | None = None
    cost: Mapping[str, Any] | None = None
    failure: str | None = None

    def outcome(self, verdict: tuple[float, ...] | None = None) -> Outcome:
        """What the task's figure is made from."""
        return Outcome(self.sample, self.answer, self.parsed, self.score, verdict)

    def to_dict(self) -> dict[str, Any]:
        """The row in JSON's own types, with what of the sample the figures need."""
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
        return {
            "id": sample.id,
            "prompt": self.prompt,
            "answer": self.answer,
            "parsed": self.parsed,
            "score": self.score,
            "answer_tokens": self.answer_tokens,
            "tokens": self.tokens,
            "question_tokens": self.question_tokens,
            "image_tokens": {str(layer): count for layer, count in (self.image_tokens or {}).items()},
            "cost": self.cost,
            "sample": kept,
        }

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
        plain = ("prompt", "answer", "parsed", "score", "answer_tokens", "tokens", "question_tokens", "cost")
        layers = {int(layer): count for layer, count in record["image_tokens"].items()}
        return cls(sample, image_tokens=layers, **{name: record[name] for name in plain})


@dataclass(frozen=True)
class Folder:
    """A result folder, for reading."""

    path: Path

    def settings(self) -> dict[str, Any]:
        """What was evaluated."""
        return read_json(self.path / SETTINGS)

    def summary(self) -> dict[str, Any]:
        """What came of it.

        Raises:
            EvaluationError: it is not done yet.
        """
        if not (self.path / SUMMARY).is_file():
            raise EvaluationError(f"{self.path} has no {SUMMARY}: finish its run first")
        return read_json(self.path / SUMMARY)

    @property
    def rows(self) -> RowFile[Row]:
        """An evaluation's rows."""
        return RowFile(self.path / ROWS, Row.to_dict, Row.from_dict)

    def judged(self) -> dict[str, Any] | None:
        """The judge and its verdicts, if there are any."""
        path = self.path / VERDICTS
        return read_json(path) if path.is_file() else None

    def outcomes(self) -> list[Outcome]:
        """The answers with their scores and marks; samples that failed are none."""
        judged = self.judged() or {"verdicts": {}}
        marks = {key: tuple(own["marks"]) for key, own in judged["verdicts"].items() if own["marks"] is not None}
        return [row.outcome(marks.get(key)) for key, row in self.rows.read().items() if row.failure is None]


@dataclass(frozen=True)
class OpenFolder(Folder):
    """A result folder that this process alone writes to."""

    def log(self, event: Mapping[str, Any]) -> None:
        """Note when, where and how long it ran."""
        with (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


@contextmanager
def claim(path: Path, settings: Mapping[str, Any]) -> Iterator[OpenFolder]:
    """Make a result folder, or go on with one, for as long as the block runs.

    Raises:
        EvaluationError: the folder holds a run with other settings, or another process is writing to it.
    """
    if path.exists() and not path.is_dir():
        raise EvaluationError(f"results need a folder, and {path} is a file")
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EvaluationError(
                    f"another process is writing to {path}; wait for it, or take another folder"
                ) from None
        _agree(path, json.loads(json.dumps(settings)))
        _cut_broken_end(path / ROWS)
        yield OpenFolder(path)


def _agree(path: Path, settings: dict[str, Any]) -> None:
    if not (path / SETTINGS).exists():
        if (path / ROWS).exists():
            raise EvaluationError(
                f"{path} has {ROWS} but no {SETTINGS}, so nothing tells what they are; clear it first"
            )
        write_json(path / SETTINGS, settings)
        return
    differing = differences(read_json(path / SETTINGS), settings)
    if differing:
        raise EvaluationError(
            f"{path} holds a run with other settings: {'; '.join(differing)}. Take another folder for this one"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Which settings differ, and how, one text each."""
    was, now = dict(_flat(old)), dict(_flat(new))
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return [f"{name} was {json.dumps(was.get(name))}, is {json.dumps(now.get(name))}" for name in names]


def _flat(record: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _cut_broken_end(path: Path) -> None:
    """Take away a last line that was not written whole."""
    if path.is_file():
        with path.open("rb+") as file:
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        EvaluationError: there is none, or it is broken.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvaluationError(f"{path}: no such file") from None
    except ValueError as error:
        raise EvaluationError(f"{path}: broken JSON ({error})") from None
    if not isinstance(record, dict):
        raise EvaluationError(f"{path}: must be a JSON object")
    return record


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record whole or not at all."""
    write_text(path, json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
