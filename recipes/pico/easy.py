"""easy-vqa: third-party pictures of one shape and third-party questions, from the PyPI package of that name."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vlmflow.pico.questions import SceneQuestion


@dataclass(frozen=True)
class EasyPicture:
    """A picture of easy-vqa and what is asked about it."""

    path: str
    questions: tuple[SceneQuestion, ...]

    def image(self) -> Image.Image:
        """The picture, 64 x 64."""
        return Image.open(self.path).convert("RGB")

    def pixels(self, canvas: int) -> UInt8[np.ndarray, "canvas canvas 3"]:
        """The picture at the model's size, enlarged as the processor does."""
        return np.asarray(self.image().resize((canvas, canvas), Image.Resampling.BICUBIC))


@functools.cache
def easy_pictures(split: Literal["train", "test"]) -> tuple[EasyPicture, ...]:
    """All pictures of a split, in the order of their numbers.

    Raises: ModuleNotFoundError when the package is missing (pip install 'vlmflow[train]').
    """
    import easy_vqa  # only training and its evaluation need the package

    if split == "train":
        paths, asked = easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions()
    else:
        paths, asked = easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions()
    questions: dict[int, list[SceneQuestion]] = {}
    for text, answer, number in zip(*asked, strict=True):
        questions.setdefault(number, []).append(SceneQuestion("easy_vqa", text, (answer,)))
    return tuple(EasyPicture(str(paths[number]), tuple(questions[number])) for number in sorted(questions))
