"""Pico's scenes: questions of every kind about drawn pictures that its training never showed, and their captions.

The kinds mirror the paper's tasks: existence as in POPE, multiple choice as in A-OKVQA, captions as in NoCaps.
Scenes and questions are those of pico's own score card. Not in the paper: an offline benchmark.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache, partial

from PIL import Image

from vlmflow.pico.questions import KINDS
from vlmflow.pico.scenes import CANVAS, COUNTS, Scene, Split, make_scene
from vlmflow.tasks.answers import words
from vlmflow.tasks.cider import cider
from vlmflow.tasks.core import Task, open_task
from vlmflow.tasks.prompts import question
from vlmflow.tasks.sample import Picture, Sample, TaskError
from vlmflow.tasks.sources import Source

SCENES = 400
FIRST = 1_000_000  # the first scene's seed; training and its exams use smaller ones


def load(source: Source, captions: bool) -> Iterator[Sample]:
    """The captions, or else the questions: one of each kind about every scene that has something to ask of it.

    ``split`` is held_out, or new_pairs (objects in colours that training never gave them). A path cannot be given.
    """
    split = source.split or "held_out"
    if source.path is not None:
        raise TaskError("pico: draws its scenes; it takes no path")
    if split not in ("held_out", "new_pairs"):
        raise TaskError(f"pico: split must be held_out or new_pairs, got {split!r}")
    for number in range(SCENES):
        scene, name = _scene(split, number), f"{split}/{number}"
        generator = random.Random(f"evaluate {split} {FIRST + number}")
        for kind, ask in KINDS.items():
            question = ask(generator, scene)
            if question and captions == (kind == "caption"):
                yield Sample(
                    id=f"{name}/{kind}",
                    images=(Picture(name, partial(_draw, split, number)),),
                    question=question.text,
                    answer=question.answer,
                    references=question.answers,
                    group=kind,
                    origin=f"pico scene {name}",
                )


@lru_cache(maxsize=32)
def _scene(split: Split, number: int) -> Scene:
    return make_scene(split, FIRST + number, CANVAS, COUNTS)


def _draw(split: Split, number: int) -> Image.Image:
    return _scene(split, number).image()


def score(parsed: str | None, sample: Sample) -> float:
    """1 for an accepted answer, to the letter."""
    return float(parsed in sample.references)


PICO = Task(
    name="pico",
    title="Pico's scenes (questions)",
    load=partial(load, captions=False),
    prompts={"plain": question},
    rules={"text": words},
    score=score,
)
PICO_CAPTIONS = open_task(
    name="pico_captions",
    title="Pico's scenes (captions)",
    load=partial(load, captions=True),
    prompts={"plain": question},
    measure=cider,
    max_new_tokens=48,
)
