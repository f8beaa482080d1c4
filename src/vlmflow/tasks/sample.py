"""One question of a benchmark, and the images it is about."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from PIL import Image

from vlmflow.core.images import as_rgb, open_image

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # what choices go by


class TaskError(ValueError):
    """Bad input to a task, with the file and the row that it stands in."""


@dataclass(frozen=True)
class Picture:
    """An image that is opened when it is needed; its name tells it from others (two questions may share one)."""

    name: str
    content: Path | bytes | Callable[[], Image.Image | Path | bytes] = field(repr=False, compare=False)

    def open(self) -> Image.Image:
        """The image as ``open_image`` reads it.

        Raises:
            ImageError: the file is missing, or no image that can be read.
        """
        held = self._held()
        return as_rgb(held, self.name) if isinstance(held, Image.Image) else open_image(held, self.name)

    @cached_property
    def digest(self) -> str:
        """The sha-256 of its file, or of its pixels where it has none; empty where it cannot be read."""
        try:
            held = self._held()
            content = held.tobytes() if isinstance(held, Image.Image) else held
            return hashlib.sha256(content.read_bytes() if isinstance(content, Path) else content).hexdigest()
        except Exception:  # whoever opens it will be told
            return ""

    def _held(self) -> Image.Image | Path | bytes:
        return self.content() if callable(self.content) else self.content


@dataclass(frozen=True)
class Sample:
    """One question about images.

    ``answer`` is the right one as the answer rules give it (a letter, a word), ``references`` further texts it is
    compared with (captions), ``context`` what belongs to the question without being it (a hint; for a judge, the
    image in words), ``group`` the part of the benchmark, ``origin`` the file and row, for errors, ``commit`` the hub's
    of its data set.
    """

    id: str
    images: tuple[Picture, ...]
    question: str = ""
    choices: tuple[str, ...] = ()
    answer: str = ""
    references: tuple[str, ...] = ()
    context: str = ""
    group: str = ""
    origin: str = field(default="", compare=False)
    commit: str | None = field(default=None, compare=False)

    @property
    def digest(self) -> str:
        """The sha-256 of its images' digests, in order."""
        return hashlib.sha256("".join(picture.digest for picture in self.images).encode()).hexdigest()

    @property
    def letters(self) -> str:
        """The letters that the choices go by."""
        return LETTERS[: len(self.choices)]
