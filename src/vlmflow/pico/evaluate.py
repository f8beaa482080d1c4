"""Score pico by kind of question: `python -m vlmflow.pico.evaluate`.

Everything goes the ordinary way: AutoProcessor, its chat template, padded batches, greedy generate(). Four sets are
scored: held-out scenes; scenes of object-colour pairs that training never showed; easy-vqa's test split; and the
held-out questions again with the picture replaced by a blank grey one, which shows what can be guessed without sight.
"""

import importlib.metadata
import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from rich.progress import track
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmflow.pico import MODEL_DIR, checksum
from vlmflow.pico.easy import easy_pictures
from vlmflow.pico.questions import KINDS, Question
from vlmflow.pico.scenes import Split, make_scene

SEED = 1_000_000  # scenes of the evaluation start here; the exams of the training use small seeds
CANVAS = 192
COUNTS = (2, 12)
GREY = (224, 224, 224)
GROUPS = {
    "existence": ("exist_random", "exist_popular", "exist_adversarial", "exist_pair", "exist_colour"),
    "multiple choice": ("choice_colour", "choice_identity", "choice_position", "choice_knowledge"),
    "colour and position": ("colour", "position"),
}


@dataclass(frozen=True)
class Item:
    """One question to score."""

    image: Image.Image
    question: Question


@dataclass(frozen=True)
class Score:
    """Right answers of those asked, with Wilson's 95 % interval."""

    right: int
    asked: int

    def row(self) -> dict[str, float]:
        """The score as plain numbers."""
        share, z2 = self.right / self.asked, 1.96**2
        middle = (share + z2 / (2 * self.asked)) / (1 + z2 / self.asked)
        spread = math.sqrt(share * (1 - share) * z2 / self.asked + z2**2 / (4 * self.asked**2))
        spread /= 1 + z2 / self.asked
        numbers = {"accuracy": share, "low": middle - spread, "high": middle + spread}
        return {"right": self.right, "asked": self.asked} | {k: round(v, 4) for k, v in numbers.items()}


def scene_items(split: Split, scenes: int) -> Iterator[Item]:
    """One question of every kind that a scene has something to ask of."""
    for seed in range(SEED, SEED + scenes):
        scene = make_scene(split, seed, CANVAS, COUNTS)
        rng = random.Random(f"evaluate {split} {seed}")
        for kind in KINDS.values():
            if question := kind(rng, scene):
                yield Item(scene.image(), question)


def easy_items(pictures: int) -> Iterator[Item]:
    """One question about each of the first pictures of easy-vqa's test split."""
    for number, picture in enumerate(easy_pictures("test")[:pictures]):
        yield Item(picture.image(), random.Random(f"easy {number}").choice(picture.questions))


def blank(items: Iterable[Item]) -> Iterator[Item]:
    """The same questions about nothing."""
    return (Item(Image.new("RGB", (CANVAS, CANVAS), GREY), item.question) for item in items)


class Answerer:
    """A model folder that answers batches of questions greedily."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()

    @torch.inference_mode()
    def __call__(self, items: Iterable[Item]) -> list[str]:
        """The answer to each item."""
        batch = list(items)
        chats = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": item.question.text}],
                }
            ]
            for item in batch
        ]
        inputs = self.processor(
            text=self.processor.apply_chat_template(chats, add_generation_prompt=True),
            images=[[item.image] for item in batch],
            padding=True,
            return_tensors="pt",
        )
        output = self.model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            **inputs, do_sample=False, max_new_tokens=32
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]


def score(answer: Answerer, items: Iterable[Item], batch: int, title: str) -> dict[str, Score]:
    """Right and asked, by kind and by group of kinds."""
    ordered = sorted(items, key=lambda item: (item.question.kind, len(item.question.text)))
    tally: dict[str, Score] = {}
    for part in track([ordered[i : i + batch] for i in range(0, len(ordered), batch)], title):
        for item, said in zip(part, answer(part), strict=True):
            kind = item.question.kind
            names = [kind, *(group for group, kinds in GROUPS.items() if kind in kinds)]
            for name in names:
                old = tally.get(name, Score(0, 0))
                tally[name] = Score(old.right + (said in item.question.references), old.asked + 1)
    return tally


def main(
    model: Annotated[Path, typer.Option(help="Model folder.")] = MODEL_DIR,
    scenes: Annotated[int, typer.Option(help="Scenes of each set, and pictures of easy-vqa.")] = 400,
    batch: Annotated[int, typer.Option(help="Questions at once.")] = 32,
    out: Annotated[Path, typer.Option(help="Results file.")] = MODEL_DIR / "results.json",
) -> None:
    """Score a model folder and write the results."""
    answer = Answerer(model)
    sets = {
        "held-out scenes": scene_items("held_out", scenes),
        "new pairs": scene_items("new_pairs", scenes),
        "easy-vqa test": easy_items(scenes),
        "held-out questions, blank picture": blank(scene_items("held_out", scenes)),
    }
    results = {
        "weights": checksum(model),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "vlmflow")},
        "seed": SEED,
        "scenes": scenes,
        "decoding": "greedy",
        "sets": {
            title: {name: s.row() for name, s in score(answer, items, batch, title).items()}
            for title, items in sets.items()
        },
    }
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({title: {k: v["accuracy"] for k, v in s.items()} for title, s in results["sets"].items()}))


if __name__ == "__main__":
    typer.run(main)
