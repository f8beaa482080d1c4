"""The embedded model's score card, by kind of question: ``python -m recipes.pico.score_card``.

Four sets are scored: held-out scenes; scenes of object-colour pairs that training never showed; easy-vqa's test split;
and the held-out questions again about a blank grey picture, which shows what can be guessed without sight. Rows lie in
a folder, so a run that was stopped goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from rich.progress import Progress

from recipes.pico import RECORD
from recipes.pico.model import checksum
from vlmflow.evaluate.evaluation import Evaluation
from vlmflow.evaluate.rows import outcomes_of
from vlmflow.evaluate.runner import run
from vlmflow.flow.study import GREY
from vlmflow.models import VLM, load
from vlmflow.pico import MODEL_DIR
from vlmflow.pico.scenes import CANVAS
from vlmflow.pruners import Unpruned
from vlmflow.records.files import versions, write_json
from vlmflow.records.folder import Folder
from vlmflow.tasks import TASKS, Outcome, Picture, Sample, Source, Task
from vlmflow.tasks.pico import FIRST

GROUPS = {
    "existence": ("exist_random", "exist_popular", "exist_adversarial", "exist_pair", "exist_colour"),
    "multiple choice": ("choice_colour", "choice_identity", "choice_position", "choice_knowledge"),
    "colour and position": ("colour", "position"),
}


@dataclass(frozen=True)
class ScoredSet:
    """Samples that are scored together; with ``blank``, their questions about an empty picture."""

    title: str
    tasks: tuple[str, ...]
    source: Source = field(default_factory=Source)
    blank: bool = False

    def samples(self, task: str, pictures: int) -> list[Sample]:
        """All questions of one of the tasks about its first pictures."""
        samples = of_first_pictures(TASKS[task].samples(self.source), pictures)
        return [blank(sample) for sample in samples] if self.blank else samples


SCENES = ("pico", "pico_captions")
SETS = (
    ScoredSet("held-out scenes", SCENES, Source(split="held_out")),
    ScoredSet("new pairs", SCENES, Source(split="new_pairs")),
    ScoredSet("easy-vqa test", ("easy_vqa",)),
    ScoredSet("held-out questions, blank picture", SCENES, Source(split="held_out"), blank=True),
)


def blank(sample: Sample) -> Sample:
    """The same question about nothing."""
    return replace(sample, images=tuple(Picture(f"{picture.name} blank", nothing) for picture in sample.images))


def nothing() -> Image.Image:
    """A grey picture."""
    return Image.new("RGB", (CANVAS, CANVAS), GREY)


def of_first_pictures(samples: Sequence[Sample], pictures: int) -> list[Sample]:
    """All questions about the first pictures."""
    first = list(dict.fromkeys(sample.images[0].name for sample in samples))[:pictures]
    wanted = set(first)
    return [sample for sample in samples if sample.images[0].name in wanted]


def by_kind(task: Task, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The task's figure of every kind of question, of every group of kinds, and of all."""
    kinds = {kind: (kind,) for kind in dict.fromkeys(outcome.sample.group for outcome in outcomes)}
    kinds |= {group: members for group, members in GROUPS.items() if kinds.keys() & set(members)}
    kinds |= {"all": tuple(kinds)} if len(kinds) > 1 else {}
    return {name: figure(task, [o for o in outcomes if o.sample.group in members]) for name, members in kinds.items()}


def figure(task: Task, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A figure in percent (CIDEr: times 100) with its interval, and of how many answers it is."""
    metric = task.metric(outcomes)
    low, high = metric["interval"]
    rounded = {name: round(value, 2) for name, value in (("value", metric["value"]), ("low", low), ("high", high))}
    return {"figure": metric["figure"], **rounded, "n": metric["n"]}


def score(vlm: VLM, pictures: int, batch_size: int, work: Path) -> dict[str, dict[str, Any]]:
    """Score a model on every set; ``work`` keeps the rows."""
    card: dict[str, dict[str, Any]] = {}
    with Progress() as progress:
        for scored, name in ((each, name) for each in SETS for name in each.tasks):
            task, samples = TASKS[name], scored.samples(name, pictures)
            bar = progress.add_task(f"{scored.title}, {name}", total=len(samples))
            folder = work / f"{scored.title.replace(' ', '-').replace(',', '')}-{name}"
            run(
                vlm,
                Evaluation(task, Unpruned(), source=scored.source),
                folder,
                batch_size=batch_size,
                samples=samples,
                progress=lambda done, _total, _row, bar=bar: progress.update(bar, completed=done),
            )
            card.setdefault(scored.title, {}).update(by_kind(task, outcomes_of(Folder(folder))))
    return card


def main(
    model: Annotated[str, typer.Option(help="Hub id, local folder, or pico.")] = "pico",
    pictures: Annotated[int, typer.Option(min=1, help="Pictures of each set.")] = 400,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at once.")] = 32,
    work: Annotated[Path, typer.Option(help="Folder for the rows.")] = Path("runs/score-card"),
    out: Annotated[Path, typer.Option(help="Results file.")] = RECORD / "results.json",
) -> None:
    """Score a model by kind of question and write the results."""
    vlm = load(model)
    results = {
        "weights": checksum(MODEL_DIR if model == "pico" else Path(model)),
        "versions": versions(),
        "pictures": pictures,
        "seeds": {"first scene": FIRST, "bootstrap": Evaluation(TASKS["pico"], Unpruned()).seed},
        "decoding": "greedy",
        "command": f"python -m recipes.pico.score_card --pictures {pictures}",
        "sets": score(vlm, pictures, batch_size, work),
    }
    write_json(out, results)
    typer.echo(
        json.dumps(
            {
                title: {kind: scored["value"] for kind, scored in kinds.items()}
                for title, kinds in results["sets"].items()
            }
        )
    )


if __name__ == "__main__":
    typer.run(main)
