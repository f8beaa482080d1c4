"""Pico: a small vision-language model inside the package, and the scenes it was trained on.

MODEL_DIR is an ordinary Hugging Face folder; samples() are pictures it has never seen, with questions about them.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from vlmflow.pico.questions import SceneQuestion
from vlmflow.pico.scenes import Thing

MODEL_DIR = Path(__file__).parent / "weights"
SAMPLES_DIR = Path(__file__).parent / "samples"


@dataclass(frozen=True)
class ScenePicture:
    """A held-out scene: a picture file, what it shows and questions about it."""

    image: Path
    objects: tuple[Thing, ...]
    questions: tuple[SceneQuestion, ...]


@functools.cache
def samples() -> tuple[ScenePicture, ...]:
    """The bundled held-out scenes."""
    return tuple(
        ScenePicture(
            SAMPLES_DIR / entry["image"],
            tuple(Thing(thing["name"], thing["color"], tuple(thing["box"])) for thing in entry["objects"]),
            tuple(SceneQuestion(q["kind"], q["text"], tuple(q["answers"])) for q in entry["questions"]),
        )
        for entry in json.loads((SAMPLES_DIR / "samples.json").read_text())
    )


def picture_file(name: Path) -> Path:
    """The file that a picture's name stands for: ``sample:N`` for a bundled one, any other name for itself.

    Raises:
        ValueError: there is no bundled picture of that number.
    """
    kind, colon, number = str(name).partition(":")
    if kind != "sample" or not colon:
        return name
    files = [sample.image for sample in samples()]
    if not number.isdecimal() or int(number) >= len(files):
        raise ValueError(f"no {name}: there are {len(files)} sample pictures, sample:0 to sample:{len(files) - 1}")
    return files[int(number)]
