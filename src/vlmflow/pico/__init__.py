"""Pico: a small vision-language model inside the package, and the scenes it was trained on.

MODEL_DIR is an ordinary Hugging Face folder; samples() are pictures it has never seen, with questions about them.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
SAMPLES_DIR = Path(__file__).parent / "samples"


@dataclass(frozen=True)
class SampleObject:
    """One object of a sample; box is (x, y, width, height) in pixels."""

    name: str
    color: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class SampleQuestion:
    """A question about a sample and every answer that counts as right."""

    kind: str
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """A held-out scene: a picture file, what it shows and questions about it."""

    image: Path
    objects: tuple[SampleObject, ...]
    questions: tuple[SampleQuestion, ...]


@functools.cache
def samples() -> tuple[Sample, ...]:
    """The bundled held-out scenes."""
    return tuple(
        Sample(
            SAMPLES_DIR / entry["image"],
            tuple(SampleObject(o["name"], o["color"], tuple(o["box"])) for o in entry["objects"]),
            tuple(SampleQuestion(q["kind"], q["text"], tuple(q["answers"])) for q in entry["questions"]),
        )
        for entry in json.loads((SAMPLES_DIR / "samples.json").read_text())
    )


def checksum(folder: Path = MODEL_DIR) -> str:
    """SHA-256 of the weights of a model folder; the model card of ours records what it should be."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
