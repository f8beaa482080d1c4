"""Files that are written whole or not at all, and JSON that is read strictly."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from threading import get_ident
from typing import Any

from vlmflow.core.errors import one_line


class RecordError(ValueError):
    """A file or result folder cannot be read or written as asked; the message names it and says what to do."""


def versions() -> dict[str, str]:
    """What a result depends on."""
    packages = {name: metadata.version(name) for name in ("vlmflow", "torch", "transformers", "pillow")}
    return packages | {"python": platform.python_version()}


def read_text(path: Path) -> str:
    """A text file, in UTF-8.

    Raises:
        RecordError: there is none, or it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecordError(f"{path}: no such file or folder") from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: is not UTF-8 ({error.reason})") from None
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from None


def parse_json(text: str, path: Path, line: int = 1) -> Any:
    """A JSON value that stands in a file from ``line`` on.

    Raises:
        RecordError: it is broken or too deep, with line and column, an object in it has a key twice, or a text in it
            half a character (a lone surrogate), which no tokenizer takes and no file holds.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        if twice := [key for key, count in counts.items() if count > 1]:
            raise RecordError(f"{path}: holds {twice[0]!r} twice in one object; leave one of the two")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecordError:
        raise
    except json.JSONDecodeError as error:
        place = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        raise RecordError(f"{place}: broken JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets inside brackets
        raise RecordError(f"{path}, line {line}: JSON that cannot be read ({one_line(error)}); mend it") from None
    if _SURROGATE.search(text) and (half := _half_character(value)):
        at = max(text.lower().find(ascii(half)[1:-1]), 0)
        place = f"{path}, line {line + text.count(chr(10), 0, at)}"
        raise RecordError(f"{place}: holds half a character ({ascii(half)[1:-1]}); mend the text")
    return value


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON writes them; most stand in pairs


def _half_character(value: Any) -> str | None:
    """The first lone surrogate in a JSON value's texts."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return error.object[error.start]
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A file with one JSON object.

    Raises:
        RecordError: there is none, or it is broken.
    """
    record = parse_json(read_text(path), path)
    if not isinstance(record, dict):
        raise RecordError(f"{path}: must be a JSON object")
    return record


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record whole or not at all."""
    write_text(path, json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``path`` when the block ends, safely on disk; if it fails, nothing has changed.

    Folders above it are made. Threads and processes that write the same file do not meet: the last one counts.

    Raises:
        RecordError: the place cannot be written to, or is full.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{get_ident()}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            with suppress(OSError):
                partial.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what an operating system says of a file that cannot be written into a ``RecordError`` that names it."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = "make room there, or take another place" if full else "mend that, or take another place"
        raise RecordError(f"{path}: cannot be written ({error.strerror or error}); {todo}") from error
