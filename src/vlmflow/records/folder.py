"""A result folder: settings first, rows as they come, the summary last. Whatever is killed can go on.

``settings.json`` says what is evaluated, ``rows.jsonl`` has one JSON object a sample, ``summary.json`` the figure and
all that is needed to repeat it, ``pictures.json`` the digest of each sample's images, ``log.jsonl`` when it ran, where
and how long; ``verdicts.json`` a judge's marks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from vlmflow.records.files import RecordError, read_json, write_json, write_text, writing

try:
    import fcntl
except ImportError:  # no such lock on Windows
    fcntl = None

SETTINGS, ROWS, SUMMARY, LOG, VERDICTS = "settings.json", "rows.jsonl", "summary.json", "log.jsonl", "verdicts.json"
PICTURES = "pictures.json"


@runtime_checkable
class FileRow(Protocol):
    """A row that a file can hold."""

    def to_dict(self) -> dict[str, Any]:
        """The row in JSON's own types, among them its sample's ``id``."""
        ...

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Any:
        """The row that ``to_dict`` wrote."""
        ...


R = TypeVar("R", bound=FileRow)


@dataclass(frozen=True)
class RowFile(Generic[R]):
    """A file of rows, one JSON object a line and sample, by the sample's ``id``; of two the later counts."""

    path: Path
    row_type: type[R]

    def read(self) -> dict[str, R]:
        """The rows by sample id; a last line without its end is none.

        Raises:
            RecordError: a broken line, by its number.
        """
        if not self.path.is_file():
            return {}
        rows: dict[str, R] = {}
        for number, line in enumerate(self.path.read_bytes().split(b"\n")[:-1], 1):
            try:
                record = json.loads(line)
                rows[record["id"]] = self.row_type.from_dict(record)
            except Exception:  # whatever a line that somebody else wrote makes its reader run into
                raise RecordError(
                    f"{self.path}, line {number}: not a row of this kind of run; take the line out, and its sample is "
                    "done again"
                ) from None
        return rows

    def append(self, rows: Iterable[R]) -> None:
        """Write rows so that a killed process, or machine, has lost at most those of one call."""
        with writing(self.path), self.path.open("ab") as file:
            file.write(self._text(rows).encode())
            file.flush()
            os.fsync(file.fileno())

    def put_in_order(self, ids: Sequence[str]) -> list[R]:
        """The rows in the samples' order, one a sample; so they stand in the file from now on."""
        rows = self.read()
        ordered = [rows[key] for key in ids]
        lines = self.path.read_bytes().count(b"\n")
        if list(rows) != list(ids) or lines != len(rows):
            write_text(self.path, self._text(ordered))
        return ordered

    def _text(self, rows: Iterable[R]) -> str:
        return "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows)


@dataclass(frozen=True)
class Folder:
    """A result folder, for reading."""

    path: Path

    def settings(self) -> dict[str, Any]:
        """What was evaluated."""
        return read_json(self.path / SETTINGS)

    def summary(self) -> dict[str, Any]:
        """The figures of a finished run.

        Raises:
            RecordError: it is not done yet.
        """
        if not (self.path / SUMMARY).is_file():
            raise RecordError(f"{self.path} has no {SUMMARY}: finish its run first")
        return read_json(self.path / SUMMARY)


@dataclass(frozen=True)
class OpenFolder(Folder):
    """A result folder that this process alone writes to."""

    def log(self, event: Mapping[str, Any]) -> None:
        """Note when, where and how long it ran."""
        with writing(self.path / LOG), (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def keep_pictures(self, digests: Mapping[str, str], done: Collection[str]) -> None:
        """Note the digests of the images, by sample id, that the rows to come are about.

        What was mended since it failed is noted anew; of what is ``done`` a folder that knows no digests says nothing.

        Raises:
            RecordError: images of a sample that is done have been exchanged.
        """
        path = self.path / PICTURES
        before = read_json(path) if path.is_file() else {}
        changed = [key for key, digest in digests.items() if key in done and before.get(key, digest) != digest]
        if changed:
            raise RecordError(
                f"{self.path} holds answers about other images than those of {len(changed)} samples now "
                f"({changed[0]}{', ...' if changed[1:] else ''}); put the images back, or take another folder"
            )
        kept = {key: before.get(key) if key in done else digest for key, digest in digests.items()}
        kept = {key: digest for key, digest in kept.items() if digest is not None}
        if kept != before:
            write_json(path, kept)


@contextmanager
def claim(path: Path, settings: Mapping[str, Any]) -> Iterator[OpenFolder]:
    """Make a result folder, or go on with one, for as long as the block runs.

    Raises:
        RecordError: the folder holds a run with other settings, or another process is writing to it.
    """
    if path.exists() and not path.is_dir():
        raise RecordError(f"results need a folder, and {path} is a file")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        lock_file = (path / ".lock").open("w")
    with lock_file as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RecordError(
                    f"another process is writing to {path}; wait for it, or take another folder"
                ) from None
        for left in path.glob(".*.partial"):  # by a process that was killed
            left.unlink()
        _agree(path, json.loads(json.dumps(settings)))
        if (rows := path / ROWS).is_file():  # take away a last line that was not written whole
            os.truncate(rows, rows.read_bytes().rfind(b"\n") + 1)
        yield OpenFolder(path)


def _agree(path: Path, settings: dict[str, Any]) -> None:
    if not (path / SETTINGS).exists():
        if (path / ROWS).exists():
            raise RecordError(f"{path} has {ROWS} but no {SETTINGS}, so nothing tells what they are; clear it first")
        write_json(path / SETTINGS, settings)
        return
    differing = differences(read_json(path / SETTINGS), settings)
    if differing:
        raise RecordError(
            f"{path} holds a run with other settings: {'; '.join(differing)}. Take another folder for this one"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Which settings differ, and how, one text each.

    A setting that only one of them has is none: an older version did not write it. A prompt style's name does not count
    where the samples' digest, which holds the prompts themselves, is the same.
    """
    was, now = dict(_flat(old)), dict(_flat(new))
    if "samples.sha256" in was and was["samples.sha256"] == now.get("samples.sha256"):
        now["prompt"] = was.get("prompt")
    names = [name for name in was if name in now and not _same(was[name], now[name])]
    return [f"{name} was {json.dumps(was[name])}, is {json.dumps(now[name])}" for name in names]


def _same(old: object, new: object) -> bool:
    """Whether a setting is what it was; what was solved for may differ in its last digits from version to version."""
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=1e-9)
    return old == new


def _flat(record: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
