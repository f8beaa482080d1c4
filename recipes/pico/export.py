"""Make the shipped folders from a training run: ``python -m recipes.pico.export``.

The model folder gets the averaged weights for pictures of the full canvas and a model card, the samples folder
held-out scenes with their questions; the training's history and curves stay beside this script.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import random
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib import colormaps
from matplotlib.figure import Figure

from recipes.pico import RECORD
from recipes.pico.curriculum import STAGES, CurriculumStage
from recipes.pico.model import build_model, checksum, resize_positions, save_folder
from recipes.pico.train import HISTORY, SEED, TrainingState
from vlmflow.pico import MODEL_DIR, SAMPLES_DIR
from vlmflow.pico.questions import KINDS
from vlmflow.pico.scenes import CANVAS, COUNTS, make_scene

SAMPLES = 24
SAMPLE_SEED = 2_000_000


def read_log(folder: Path) -> list[dict]:
    """The rows of a run's log; where a crash made it repeat steps, the later rows count."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return list({tuple(row.get(key) for key in ("stage", "step", "exam", "note")): row for row in rows}.values())


def draw_curves(rows: list[dict], stages: tuple[CurriculumStage, ...], path: Path) -> None:
    """Loss and accuracy by kind over the steps of all stages."""
    start, total = {}, 0
    for stage in stages:
        start[stage.name], total = total, total + stage.steps
    figure = Figure(figsize=(11, 9), layout="constrained")
    losses, accuracies = figure.subplots(2, sharex=True)
    accuracies.set_prop_cycle(color=list(colormaps["tab20"](range(20))))
    lines: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        x = start[row["stage"]] + row["step"]
        for name, value in row.items():
            if name in ("loss", "naming"):
                lines["loss", name if "exam" not in row else ""].append((x, value))
            elif name in (*KINDS, "object", "color") and row.get("exam") == "held_out":
                lines["accuracy", name].append((x, value))
    for (axis, name), points in sorted(lines.items()):
        if name:
            (losses if axis == "loss" else accuracies).plot(*zip(*points, strict=True), label=name)
    for axis, title in ((losses, "training loss"), (accuracies, "accuracy on held-out scenes")):
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
        for name, x in start.items():
            axis.axvline(x, color="grey", linewidth=0.5)
            axis.annotate(name, (x, 1), xycoords=("data", "axes fraction"), fontsize=8, va="bottom", rotation=60)
    accuracies.set_xlabel("step")
    figure.savefig(path, dpi=110)


def model_card(
    rows: list[dict], notes: list[str], stages: tuple[CurriculumStage, ...], state: TrainingState, digest: str
) -> str:
    """What the model is, how these weights were made, and how far they came."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy", "pillow")}
    hours = sum(row.get("seconds", 0) for row in rows) / 3600
    done = [
        f"| {s.name} | {s.canvas} | {s.counts[0]}-{s.counts[1]} | {s.scenes} x {sum(s.questions)} | "
        f"{s.steps if i < state.stage else state.step if i == state.stage else 0} of {s.steps} |"
        for i, s in enumerate(stages)
    ]
    exams = {row["exam"]: row for row in rows if "exam" in row}
    when = ", ".join(dict.fromkeys(f"{row['stage']} step {row['step']}" for row in exams.values()))
    last = [
        f"| {kind} | " + " | ".join(f"{exam.get(kind, math.nan):.3f}" for exam in exams.values()) + " |"
        for kind in KINDS
    ]
    finished = state.stage == len(stages)
    return "\n".join(
        [
            "---",
            "license: apache-2.0",
            "library_name: transformers",
            "pipeline_tag: image-text-to-text",
            "---",
            "# pico",
            "",
            "A LLaVA of five million weights (CLIP tower, projector, ten Llama layers; 576 image tokens) that answers",
            "questions about scenes of coloured pictographs. It is for measuring what pruning of image tokens does,",
            "offline and on two cores. Any text can be typed, but it only knows its own world: 36 objects, 8 colours,",
            "and the questions in `vlmflow/pico/questions.py`; and the pictures and questions of easy-vqa.",
            "",
            "The file holds half precision; it loads as float32, which CPUs without half-precision units need.",
            "",
            "## Training",
            "",
            f"`python -m recipes.pico.train`, seed {SEED}, on scenes made from seeds; one (object, colour) pair in",
            "twelve never occurs. "
            + ("All stages are complete." if finished else "**Training is not complete: see the steps.**"),
            f"{hours:.1f} hours on two shared cores ({platform.machine()}); "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + ". The weights are a running average of the last steps.",
            "",
            "| stage | pixels | objects | scenes x questions a step | steps |",
            "|---|---|---|---|---|",
            *done,
            "",
            "Each stage in full: `" + json.dumps([asdict(stage) for stage in stages]) + "`",
            "",
            *(["Departures of this run from the recipe:", "", *(f"- {note}" for note in notes), ""] if notes else []),
            "Losses and accuracies, step by step: `recipes/pico/curves.png` and `training.jsonl` in the project.",
            "",
            f"## Last exam of the training, exact answers ({when}, pictures as in that stage)",
            "",
            "| kind | " + " | ".join(exams) + " |",
            "|---|" + "---|" * len(exams),
            *last,
            "",
            "Every kind of question on four sets of pictures: `recipes/pico/results.json` in the project, which",
            "`python -m recipes.pico.score_card` writes. What pruning does to these answers: its `docs/results.md`.",
            "",
            f"SHA-256 of model.safetensors: `{digest}`",
            "",
        ]
    )


def write_samples(folder: Path) -> None:
    """Held-out scenes as PNG, with their objects and one question of every kind."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict] = []
    for seed in range(SAMPLE_SEED, SAMPLE_SEED + SAMPLES):
        scene = make_scene("held_out", seed, CANVAS, COUNTS)
        rng = random.Random(f"samples {seed}")
        asked = [question for kind in KINDS.values() if (question := kind(rng, scene))]
        name = f"{seed - SAMPLE_SEED:02d}.png"
        scene.image().save(folder / name, optimize=True)
        entries.append(
            {
                "image": name,
                "objects": [{"name": t.name, "color": t.colour, "box": t.box} for t in scene.things],
                "questions": [{"kind": q.kind, "text": q.text, "answers": q.answers} for q in asked],
            }
        )
    (folder / "samples.json").write_text(json.dumps(entries, indent=1) + "\n")


def export(run: Path, folder: Path, record: Path, stages: tuple[CurriculumStage, ...] = STAGES) -> None:
    """Write the model folder of a run as far as it has come, and its history and curves into ``record``."""
    state = TrainingState(**torch.load(run / "checkpoint.pt"))
    if state.average is None:
        raise ValueError(f"{run} has no weights yet: train first")
    model = build_model(CANVAS, SEED)
    model.load_state_dict(resize_positions(state.average, CANVAS))
    save_folder(model, folder)
    history = read_log(run)
    last = state.stage - (state.step == 0)  # a stage that is whole counts as its last step
    reached = {"stage": stages[last].name, "step": state.step or stages[last].steps}
    record.mkdir(parents=True, exist_ok=True)
    (record / HISTORY).write_text("".join(json.dumps(row) + "\n" for row in [*history, reached]))
    rows, notes = [row for row in history if "note" not in row], [row["note"] for row in history if "note" in row]
    draw_curves(rows, stages, record / "curves.png")
    (folder / "README.md").write_text(model_card(rows, notes, stages, state, checksum(folder)))


def main(
    run: Annotated[Path, typer.Option(help="Folder of the training run.")] = Path("runs/pico"),
    model: Annotated[Path, typer.Option(help="Model folder to write.")] = MODEL_DIR,
    record: Annotated[Path, typer.Option(help="Folder for the history and the curves.")] = RECORD,
    samples: Annotated[Path, typer.Option(help="Samples folder to write.")] = SAMPLES_DIR,
) -> None:
    """Write the model and samples folders."""
    export(run, model, record)
    write_samples(samples)


if __name__ == "__main__":
    typer.run(main)
