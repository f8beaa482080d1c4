"""Training batches: many questions a picture, in groups of equal length, each seeing the picture and itself only."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from recipes.pico.easy import easy_pictures
from recipes.pico.patches import PATCH, patch_labels
from recipes.pico.text import BOS, EOS, PAD, SYSTEM
from vlmflow.pico.questions import CAPTIONS, CHOICE_LETTERS, CHOICES, SHORT, SceneQuestion
from vlmflow.pico.scenes import Scene, Split, make_scene

IGNORE = -100
FOCUS = 3  # times as often as others are the kinds drawn that a stage has in focus
OPENING = f"{BOS}{SYSTEM} USER: "  # what the chat template puts before the picture


@dataclass(frozen=True)
class Group:
    """Questions of one padded length; labels are the next token where it belongs to an answer, else IGNORE.

    verdicts are, at every word of a multiple choice's options, 1 if the right one begins as this one does so far, 0 if
    not; elsewhere IGNORE.
    """

    ids: Int[Tensor, "scenes questions length"]
    labels: Int[Tensor, "scenes questions length"]
    verdicts: Int[Tensor, "scenes questions length"]
    kinds: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Patches:
    """Patch labels of a batch (see ``PatchLabels``); known is False for pictures that have none."""

    name: Int[Tensor, "scenes patches"]
    colour: Int[Tensor, "scenes patches"]
    quarter: Int[Tensor, "scenes patches"]
    centre: Int[Tensor, "scenes patches"]
    known: Bool[Tensor, "scenes patches"]


@dataclass(frozen=True)
class Batch:
    """Pictures in [-1, 1], their questions and their patch labels."""

    pixels: Float[Tensor, "scenes 3 canvas canvas"]
    groups: tuple[Group, ...]
    patches: Patches


@dataclass(frozen=True)
class Example:
    """A picture, the questions of each group, and the scene behind it when it is one of ours."""

    pixels: np.ndarray
    questions: tuple[list[SceneQuestion], ...]
    scene: Scene | None


def normalise(pixels: np.ndarray) -> Float[Tensor, "scenes 3 canvas canvas"]:
    """What the processor does to pictures of the right size: uint8 to [-1, 1], channels first."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def scene_example(
    split: Split,
    seed: int,
    canvas: int,
    counts: tuple[int, int],
    questions: tuple[int, int, int],
    focus: tuple[str, ...] = (),
) -> Example:
    """A scene and its questions: so many short ones, choices and captions; kinds in focus more often."""
    scene = make_scene(split, seed, canvas, counts)
    rng = random.Random(f"questions {split} {seed} {canvas}")
    asked: list[list[SceneQuestion]] = []
    for number, families in zip(questions, (SHORT, CHOICES, CAPTIONS), strict=True):
        shares = [FOCUS if any(kind.__name__ in focus for kind in family) else 1 for family in families]
        group: list[SceneQuestion] = []
        while len(group) < number:
            if question := rng.choice(rng.choices(families, shares)[0])(rng, scene):
                group.append(question)
        asked.append(group)
    return Example(scene.pixels, tuple(asked), scene)


def easy_example(seed: int, canvas: int, questions: tuple[int, int, int]) -> Example:
    """A picture of easy-vqa's train split and questions about it."""
    rng = random.Random(f"easy {seed}")
    picture = rng.choice(easy_pictures("train"))
    asked = tuple(rng.choices(picture.questions, k=number) for number in questions)
    return Example(picture.pixels(canvas), asked, None)


def encode_question(
    tokenizer: PreTrainedTokenizerFast, question: SceneQuestion
) -> tuple[list[int], list[int], list[int]]:
    """Token ids after the picture, without the last; what to predict at each: IGNORE, then the answer; verdicts."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    asked, answer = encode(f"\n{question.text} ASSISTANT:"), encode(f" {question.answer}{EOS}")
    ids = asked + answer[:-1]
    verdicts = [IGNORE] * len(ids)
    right = question.options and question.options[CHOICE_LETTERS.index(question.answer)].split()
    for letter, option in zip(CHOICE_LETTERS, question.options, strict=False):
        before, _, _ = question.text.partition(f" {letter}. {option}")
        words = option.split()
        for number in range(1, len(words) + 1):
            read = encode(f"\n{before} {letter}. {' '.join(words[:number])}")
            verdicts[len(read) - 1] = int(words[:number] == right[:number])
    return ids, [IGNORE] * (len(asked) - 1) + answer, verdicts


def _group(tokenizer: PreTrainedTokenizerFast, asked: list[list[SceneQuestion]]) -> Group:
    encoded = [[encode_question(tokenizer, question) for question in questions] for questions in asked]
    length = max(len(tokens) for row in encoded for tokens, _, _ in row)

    def padded(part: int, filler: int) -> Tensor:
        return torch.tensor([[x[part] + [filler] * (length - len(x[part])) for x in row] for row in encoded])

    kinds = tuple(tuple(question.kind for question in questions) for questions in asked)
    return Group(padded(0, tokenizer.get_vocab()[PAD]), padded(1, IGNORE), padded(2, IGNORE), kinds)


def collate(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> Batch:
    """Put examples of one canvas together."""
    patches = (examples[0].pixels.shape[0] // PATCH) ** 2
    labels = [patch_labels(e.scene) if e.scene else None for e in examples]
    unknown = np.full(patches, -1)

    def stack(field: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(label, field) if label else unknown for label in labels]))

    known = torch.tensor([label is not None for label in labels])[:, None].expand(-1, patches)
    return Batch(
        normalise(np.stack([e.pixels for e in examples])),
        tuple(
            _group(tokenizer, [example.questions[index] for example in examples])
            for index in range(len(examples[0].questions))
            if examples[0].questions[index]
        ),
        Patches(stack("name"), stack("colour"), stack("quarter"), stack("centre"), known),
    )


def opening_ids(tokenizer: PreTrainedTokenizerFast) -> Int[Tensor, " opening"]:
    """Token ids of a prompt before the picture."""
    return torch.tensor(tokenizer.encode(OPENING, add_special_tokens=False))
