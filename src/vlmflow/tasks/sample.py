"""One question of a benchmark, and the images it is about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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
    content: Path | bytes | Callable[[], Image.Image] = field(repr=False, compare=False)

    def open(self) -> Image.Image:
        """The image as ``open_image`` reads it.

        Raises:
            ImageError: the file is missing, or no image that can be read.
        """
        if callable(self.content):
            return as_rgb(self.content(), self.name)
        return open_image(self.content, self.name)


@dataclass(frozen=True)
class Sample:
    """One question about images.

    ``answer`` is the right one as the answer rules give it (a letter, a word), ``references`` further texts it is
    compared with (captions), ``context`` what belongs to the question without being it (a hint; for a judge, the
    image in words), ``group`` the part of the benchmark, ``origin`` the file and row, for errors.
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

    @property
    def letters(self) -> str:
        """The letters that the choices go by."""
        return LETTERS[: len(self.choices)]
