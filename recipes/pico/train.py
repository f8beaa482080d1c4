"""Train pico from nothing to the shipped weights: ``python -m recipes.pico.train``.

Everything follows from the stages and the seed: the scenes of a step and the order of the sums. Stopping it (Ctrl-C)
loses nothing, a crash at most five minutes: the next start goes on from the last checkpoint. Two threads compute parts
of a step side by side, each with one core; on a shared machine that wastes far less than two threads in each product.
"""

from __future__ import annotations

import functools
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Int
from rich.progress import track
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from recipes.pico import RECORD
from recipes.pico.batches import IGNORE, Batch, collate, easy_example, opening_ids, scene_example
from recipes.pico.blockwise import use_blocks
from recipes.pico.curriculum import NO_QUESTIONS, STAGES, CurriculumStage
from recipes.pico.learning import (
    TaughtWords,
    answer_labels,
    answer_shares,
    counting_loss,
    naming_loss,
    read,
    right_by_kind,
    see,
    verdict_loss,
)
from recipes.pico.model import build_model, resize_positions
from recipes.pico.muon import Muon
from recipes.pico.text import build_tokenizer
from vlmflow.pico.scenes import Split

SEED = 0
HISTORY = "training.jsonl"  # of a run that was exported
THREADS = 2
NAMING_WEIGHT = 0.3
VERDICT_WEIGHT = 0.5
COUNTING_WEIGHT = 0.5
WARMUP = 50  # steps
LOG_EVERY = 20  # steps
EXAM_EVERY = 100  # steps
EXAM_SCENES = 48
EXAM_QUESTIONS = (18, 10, 1)
AVERAGE = 0.99  # what the running average of the weights keeps at a step
CHECKPOINT_SECONDS = 300


Sums = dict[str, float]
"""Sums over batches: losses and how many there were, and of each kind how many were right and how many asked."""


def added(first: Sums, other: Sums) -> Sums:
    """The sums of both."""
    return {name: first.get(name, 0) + other.get(name, 0) for name in first | other}


@dataclass(frozen=True)
class Lesson:
    """What turns a batch into a loss."""

    model: LlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    words: TaughtWords
    opening: Int[Tensor, " opening"]

    @classmethod
    def start(cls, stage: CurriculumStage, weights: dict[str, Tensor] | None) -> Lesson:
        """The model at a stage's canvas, with the weights learnt so far."""
        model, tokenizer = build_model(stage.canvas, SEED), build_tokenizer()
        if weights:
            model.load_state_dict(resize_positions(weights, stage.canvas))
        use_blocks(model)
        return cls(model, tokenizer, TaughtWords.of(tokenizer), opening_ids(tokenizer))

    def loss(self, batch: Batch) -> tuple[Tensor, Sums]:
        """The loss of a batch, and what to report of it."""
        features = see(self.model, batch.pixels)
        report: Sums = {}
        loss = features.new_zeros(())
        if batch.patches.known.any():
            embeddings = self.model.model.language_model.embed_tokens
            loss, right = naming_loss(features, embeddings.weight, self.words, batch.patches)
            report |= {"naming": loss.item(), "namings": 1} | right
        if batch.groups:
            reading, labels = read(self.model, features, batch, self.opening), answer_labels(batch)
            each = F.cross_entropy(reading.answers, labels[labels != IGNORE], reduction="none")
            answers = (each * answer_shares(batch)).sum()
            loss = answers + NAMING_WEIGHT * loss
            report |= {"loss": answers.item(), "losses": 1}
            if len(reading.options):
                verdicts, right = verdict_loss(reading.options, self.words.verdicts, batch)
                loss = loss + VERDICT_WEIGHT * verdicts
                report |= {"verdicts": 1} | right
            if batch.patches.known.any():
                sums, right = counting_loss(reading.patches, self.words.numbers, batch.patches)
                loss = loss + COUNTING_WEIGHT * sums
                report |= {"sums": 1} | right
            for kind, (right, asked) in right_by_kind(reading.answers, batch).items():
                report |= {f"{kind}/right": right, f"{kind}/asked": asked}
        return loss, report


def part_batch(tokenizer: PreTrainedTokenizerFast, stage: CurriculumStage, step: int, part: int) -> Batch:
    """One part of a step; its seeds follow from the step, so that a resumed run sees what an unbroken one sees."""
    first = step * stage.scenes + part * stage.part
    seeds = range(first, first + stage.part)
    number = step * (stage.scenes // stage.part) + part
    if stage.easy_vqa and number % stage.easy_vqa == 0:
        return collate(tokenizer, [easy_example(seed, stage.canvas, stage.questions) for seed in seeds])
    return collate(
        tokenizer,
        [scene_example("train", seed, stage.canvas, stage.counts, stage.questions, stage.focus) for seed in seeds],
    )


def make_optimizers(model: LlavaForConditionalGeneration, stage: CurriculumStage) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices, AdamW for the rest; the tower moves slowly once the decoder learns."""
    hidden: list[nn.Parameter] = []
    tower: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    aligning = stage.questions == NO_QUESTIONS
    for name, weight in model.named_parameters():
        sees = "vision_tower" in name or "multi_modal_projector" in name
        inner = weight.ndim == 2 and ".layers." in name
        if aligning and not sees and weight is not model.get_input_embeddings().weight:
            continue
        if inner and (aligning or not sees):
            hidden.append(weight)
        elif sees and not aligning:
            tower.append(weight)
        else:
            rest.append(weight)
    groups = [{"params": rest, "lr": stage.adam_rate}, {"params": tower, "lr": stage.tower_rate}]
    adam = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.01, betas=(0.9, 0.95))
    optimizers = [Muon(hidden, lr=stage.muon_rate), adam]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return optimizers


def rate_share(stage: CurriculumStage, step: int) -> float:
    """Share of the peak learning rate at a step: a short warm-up, a plateau, a linear fall."""
    left = (stage.steps - step) / (stage.decay * stage.steps)
    return min(1.0, (step + 1) / WARMUP, max(0.02, left))


def resized(weights: dict[str, Tensor] | None, stage: CurriculumStage) -> dict[str, Tensor] | None:
    """Weights for the canvas of a stage."""
    return weights and resize_positions(weights, stage.canvas)


def blend(average: dict[str, Tensor], model: LlavaForConditionalGeneration, keep: float) -> None:
    """Move a running average of the weights towards the model's: it stands for a lower learning rate."""
    for name, weight in model.state_dict().items():
        average[name].lerp_(weight, 1 - keep)


@dataclass(frozen=True)
class TrainingState:
    """How far a run has come: everything that it needs to go on."""

    stage: int = 0
    step: int = 0
    weights: dict[str, Tensor] | None = None
    average: dict[str, Tensor] | None = None
    optimizers: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainingRun:
    """A training run and the folder that it can go on from."""

    folder: Path
    stages: tuple[CurriculumStage, ...]
    pool: ThreadPoolExecutor
    stop: threading.Event

    @property
    def checkpoint(self) -> Path:
        """Where the state of the run is kept."""
        return self.folder / "checkpoint.pt"

    @property
    def history(self) -> Path:
        """Losses, accuracies and exams; a line with a ``note`` says where a run was steered by hand."""
        return self.folder / "log.jsonl"

    def save(self, state: TrainingState) -> None:
        """Write the state, so that a reader finds either the old one or the new one, whole."""
        draft = self.checkpoint.with_suffix(".draft")
        torch.save(asdict(state), draft)
        draft.replace(self.checkpoint)

    def log(self, row: Mapping[str, object]) -> None:
        """Print one line and keep it."""
        line = json.dumps(row)
        print(line, flush=True)
        with self.history.open("a") as log:
            log.write(line + "\n")

    def continue_from(self, model: Path, history: Path) -> None:
        """Begin with an exported model folder, where the run of that history stopped; momenta begin anew."""
        rows = [json.loads(line) for line in history.read_text().splitlines()]
        last = [row for row in rows if "step" in row][-1]
        number = next(number for number, stage in enumerate(self.stages) if stage.name == last["stage"])
        done = last["step"] == self.stages[number].steps
        weights = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32).state_dict()
        self.save(TrainingState(number + 1 if done else number, 0 if done else last["step"], weights, weights))
        shutil.copyfile(history, self.history)
        self.log({"note": f"{last['stage']}, step {last['step']}: went on from exported weights (half precision)."})

    def train(self) -> TrainingState:
        """Run the stages, or what is left of them, until the last step or a request to stop."""
        done = TrainingState(**torch.load(self.checkpoint)) if self.checkpoint.exists() else TrainingState()
        while done.stage < len(self.stages) and not self.stop.is_set():
            done = self.run_stage(done)
            self.save(done)
        return done

    def run_stage(self, done: TrainingState) -> TrainingState:
        """Train one stage from where it stands."""
        stage, report = self.stages[done.stage], Sums()
        lesson = Lesson.start(stage, done.weights)
        optimizers = make_optimizers(lesson.model, stage)
        for optimizer, state in zip(optimizers, done.optimizers, strict=False):
            optimizer.load_state_dict(state)
        weights = [w for o in optimizers for group in o.param_groups for w in group["params"]]
        average = {name: w.clone() for name, w in (resized(done.average, stage) or lesson.model.state_dict()).items()}

        def reached(step: int) -> TrainingState:
            states = [optimizer.state_dict() for optimizer in optimizers]
            return TrainingState(done.stage, step, lesson.model.state_dict(), average, states)

        began = saved = time.monotonic()
        steps = range(done.step, stage.steps)
        for step in track(steps, stage.name, disable=not sys.stdout.isatty()):
            report = added(report, self.gradients(lesson, stage, step, weights))
            nn.utils.clip_grad_norm_(weights, 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate_share(stage, step)
                optimizer.step()
            blend(average, lesson.model, min(AVERAGE, step / (step + 10)))
            if (step + 1) % LOG_EVERY == 0:
                now = time.monotonic()
                self.log({"stage": stage.name, "step": step + 1, "seconds": round(now - began, 1)} | means(report))
                report, began = {}, now
            if (step + 1) % EXAM_EVERY == 0 or step + 1 == stage.steps:
                for split in ("held_out", "new_pairs"):
                    sums = self.exam(stage, average, split)
                    self.log({"stage": stage.name, "step": step + 1, "exam": split} | means(sums))
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.save(reached(step + 1))
                saved = time.monotonic()
            if self.stop.is_set():
                return reached(step + 1)
        return TrainingState(done.stage + 1, 0, average, average)

    def exam(self, stage: CurriculumStage, weights: dict[str, Tensor], split: Split) -> Sums:
        """How the averaged weights do on scenes that training never shows: summed reports as in training."""
        lesson, questions = Lesson.start(stage, weights), EXAM_QUESTIONS if any(stage.questions) else NO_QUESTIONS

        def part(first: int) -> Sums:
            seeds = range(first, first + stage.part)
            scenes = [scene_example(split, seed, stage.canvas, stage.counts, questions) for seed in seeds]
            with torch.no_grad():
                return lesson.loss(collate(lesson.tokenizer, scenes))[1]

        return functools.reduce(added, self.pool.map(part, range(0, EXAM_SCENES, stage.part)))

    def gradients(self, lesson: Lesson, stage: CurriculumStage, step: int, weights: list[Tensor]) -> Sums:
        """Set the gradient of every weight to the mean over the parts of a step; return the summed reports."""

        def part(number: int) -> tuple[tuple[Tensor | None, ...], Sums]:
            loss, report = lesson.loss(part_batch(lesson.tokenizer, stage, step, number))
            return torch.autograd.grad(loss, weights, allow_unused=True), report

        parts = stage.scenes // stage.part
        total: Sums = {}
        for weight in weights:
            weight.grad = None
        for grads, report in self.pool.map(part, range(parts)):
            total = added(total, report)
            for weight, grad in zip(weights, grads, strict=True):
                if grad is not None:
                    weight.grad = grad / parts if weight.grad is None else weight.grad.add_(grad, alpha=1 / parts)
        return total


def means(report: Sums) -> Sums:
    """Means of summed reports: losses, patch accuracies, and the accuracy of each kind."""
    row: Sums = {}
    if "namings" in report:
        row |= {name: report[name] / report["namings"] for name in ("naming", "object", "color", "place", "centre")}
    if "losses" in report:
        row["loss"] = report["loss"] / report["losses"]
    if "verdicts" in report:
        row["verdict"] = report["verdict"] / report["verdicts"]
    if "sums" in report:
        row["sum"] = report["sum"] / report["sums"]
    for name in sorted(report):
        if name.endswith("/asked"):
            kind = name.removesuffix("/asked")
            row[kind] = report[f"{kind}/right"] / report[name]
    return {name: round(value, 3) for name, value in row.items()}


def main(
    folder: Annotated[Path, typer.Option(help="Checkpoints and logs.")] = Path("runs/pico"),
    start: Annotated[Path | None, typer.Option(help="An exported model folder that a new run goes on from.")] = None,
    history: Annotated[Path, typer.Option(help="The history that was exported with it.")] = RECORD / HISTORY,
) -> None:
    """Train pico, or go on training it."""
    folder.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: stop.set())
    torch.set_num_threads(THREADS)  # for the optimizers; threads inside a product of the pool would wait for each other
    with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        run = TrainingRun(folder, STAGES, pool, stop)
        if start is not None and not run.checkpoint.exists():
            run.continue_from(start, history)
        run.train()


if __name__ == "__main__":
    typer.run(main)
