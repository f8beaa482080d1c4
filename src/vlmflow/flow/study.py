"""Look at a task's samples one by one: drop those that need no image, write a row each, and sum up the rest."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vlmflow.core.errors import typed_line
from vlmflow.core.layout import SEGMENTS, Layout
from vlmflow.core.statistics import Resampled, clusters_of
from vlmflow.engine import attach
from vlmflow.evaluate.rows import Row
from vlmflow.evaluate.runner import FAILURES_IN_A_ROW, Evaluation, Subject
from vlmflow.flow.findings import Finding, findings_of
from vlmflow.flow.target_tokens import likeliest, spellings
from vlmflow.flow.verdict import numbers
from vlmflow.models import VLM, Question
from vlmflow.pruners import Unpruned
from vlmflow.records.files import RecordError, write_json, write_text
from vlmflow.records.folder import SUMMARY, claim
from vlmflow.tasks import Sample, Source, Task

VERDICT = "verdict.md"
GREY = (224, 224, 224)  # of a blank picture

Progress = Callable[[int, int, Row | None], None]  # samples done, of how many, and which came; None to begin


@dataclass(frozen=True)
class Asked:
    """One prompt, encoded: what its model predicts next, and the token with which the right answer begins."""

    inputs: Mapping[str, Any]
    layout: Layout
    logits: Float[Tensor, " vocab"]
    target: int


@runtime_checkable
class Experiment(Protocol):
    """What is looked at in every sample, and what is made of it."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    def settings(self, n_layers: int) -> dict[str, Any]:
        """All that its numbers depend on.

        Raises:
            ValueError: what does not fit the model.
        """
        ...

    def look(self, vlm: VLM, asked: Asked, seed: int) -> dict[str, Any]:
        """A sample's numbers, in JSON's own types."""
        ...

    def sum_up(self, findings: Sequence[Finding], n_layers: int, seed: int) -> dict[str, Any]:
        """The samples' numbers together."""
        ...

    def verdict(self, summary: Mapping[str, Any]) -> str:
        """What they mean, in Markdown."""
        ...


@dataclass(frozen=True)
class Study:
    """An experiment on the samples of a task; ``seed`` is that of the bootstrap and of random controls."""

    task: Task
    experiment: Experiment
    source: Source = field(default_factory=Source)
    limit: int | None = None
    seed: int = 0

    def samples(self) -> list[Sample]:
        """The samples that are looked at.

        Raises:
            TaskError: what is wrong with the source.
            RecordError: a sample without an image, or without one right answer.
        """
        samples = self.task.samples(self.source, self.limit)
        for sample in samples:
            place = sample.origin or sample.id
            if not sample.images:
                raise RecordError(f"{place}: no image, from which information could flow; leave the sample out")
            if not sample.answer.strip() or self.task.score(None, sample) is None:
                raise RecordError(
                    f"{place}: no answer that is right or wrong, whose first token could be looked at; leave the "
                    "sample out, or take another task"
                )
        return samples

    def settings(self, vlm: VLM, samples: Sequence[Sample]) -> dict[str, Any]:
        """All that the numbers depend on; two runs with the same settings give the same summary."""
        asked = Evaluation(self.task, Unpruned(), source=self.source, limit=self.limit, seed=self.seed)
        settings = asked.settings(Subject.of(vlm), samples)
        shared = {name: value for name, value in settings.items() if not name.startswith("pruner")}
        own = self.experiment.settings(vlm.n_layers)
        return {"experiment": self.experiment.name, **own, "without_image": "blank picture", **shared}


def run(
    vlm: VLM,
    study: Study,
    out: Path,
    samples: Sequence[Sample] | None = None,
    progress: Progress = lambda done, total, row: None,
) -> dict[str, Any]:
    """Look at a study's samples, one row each in a folder, or go on where a run with the same settings stopped.

    Samples are dropped if the model answers them rightly about a blank picture as well (see ``blank``). The summary
    and the verdict are made from the rows in the folder alone. Samples that failed are tried again the next time.

    Raises:
        TaskError: what is wrong with the source.
        RecordError: a sample without image or answer; the folder holds another run; all samples, or too many in a
            row, have failed; or none is left. Rows stay.
        ValueError: settings that do not fit the model.
    """
    samples = study.samples() if samples is None else samples
    settings = study.settings(vlm, samples)
    rows = findings_of(out)
    with claim(out, settings) as folder:
        known = {key for key, finding in rows.read().items() if finding.failure is None}
        done, bad, start = len(known), 0, time.time()
        progress(done, len(samples), None)
        if done < len(samples):
            (out / SUMMARY).unlink(missing_ok=True)  # it would not be that of the rows to come
            folder.log({"event": "start", "time": start, "done": done, "device": str(vlm.model.device)})
        for sample in samples:
            if sample.id in known:
                continue
            finding = examine(vlm, study, sample)
            rows.append([finding])
            done, bad = done + 1, 0 if finding.failure is None else bad + 1
            progress(done, len(samples), Row(sample, study.task.prompt(sample), failure=finding.failure))
            if bad in (FAILURES_IN_A_ROW, len(samples)):
                raise RecordError(f"{bad} samples in a row failed ({finding.failure}); the rows so far are in {out}")
        if len(known) < len(samples):
            folder.log({"event": "end", "time": time.time(), "done": done, "seconds": time.time() - start})
        findings = rows.put_in_order([sample.id for sample in samples])
        summary = sum_up(study, findings, folder.settings())
        write_json(out / SUMMARY, summary)
        write_text(out / VERDICT, study.experiment.verdict(summary))
        return json.loads(json.dumps(summary))


def blank(images: Sequence[Image.Image]) -> tuple[Image.Image, ...]:
    """Pictures of the same sizes that show nothing.

    Source: appendix B, "removed the image information".
    Departs: it may mean a prompt without image tokens. Some models, pico among them, have never seen one and answer
    it with chance words, so that nothing would be dropped; about a blank picture they answer what can be guessed.
    """
    return tuple(Image.new("RGB", image.size, GREY) for image in images)


def examine(vlm: VLM, study: Study, sample: Sample) -> Finding:
    """One sample's row; whatever goes wrong with it stands in the row."""
    task, names = study.task, tuple(picture.name for picture in sample.images)
    try:
        images, prompt = tuple(picture.open() for picture in sample.images), task.prompt(sample)
        (said,) = vlm.generate(vlm.encode([Question(prompt, blank(images))]), task.max_new_tokens)
        if task.outcome(sample, said.text).score == 1:
            return Finding(sample.id, names, said.text, dropped=True)
        asked = encode(vlm, Question(prompt, images), sample.answer)
        return Finding(
            id=sample.id,
            images=names,
            blank_answer=said.text,
            target=asked.target,
            right=int(asked.logits.argmax()) == asked.target,
            lengths={segment: len(asked.layout.positions(segment)[0]) for segment in SEGMENTS},
            found=study.experiment.look(vlm, asked, study.seed),
        )
    except Exception as error:  # a broken image, too little memory, a token outside the vocabulary: one sample's loss
        return Finding(sample.id, names, failure=typed_line(error))


@torch.no_grad()
def encode(vlm: VLM, question: Question, answer: str | None) -> Asked:
    """A prompt with its prediction; the target is how the model would begin ``answer``, or its own if None.

    Raises:
        ValueError: no token spells the answer, or one outside the vocabulary does.
    """
    inputs = vlm.encode([question])
    with attach(vlm.model) as trace:
        logits = vlm.model(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        layout = trace.layout
    if answer is None:
        return Asked(inputs, layout, logits, int(logits.argmax()))
    tokenizer = vlm.processor.tokenizer
    end = tokenizer.decode(inputs["input_ids"][0][layout.question[0]])  # an answer's spelling hangs on no more
    return Asked(inputs, layout, logits, likeliest(spellings(tokenizer, end, answer), logits)[0])


def sum_up(study: Study, findings: Sequence[Finding], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The rows together.

    Raises:
        RecordError: none is left.
    """
    kept = [finding for finding in findings if finding.kept]
    dropped = sum(finding.dropped for finding in findings)
    failed = {finding.id: finding.failure for finding in findings if finding.failure is not None}
    if not kept:
        reason = f" ({next(iter(failed.values()))})" if failed else ""
        raise RecordError(
            f"no sample is left: {dropped} of {len(findings)} were answered right about a blank picture as well, "
            f"{len(failed)} failed{reason}; take more samples, or others"
        )
    images = clusters_of([finding.images for finding in kept])
    right = Resampled.means(np.array([float(finding.right) for finding in kept]), images, study.seed)
    return {
        "settings": settings,
        "samples": {
            "asked": len(findings),
            "dropped": dropped,
            "failed": len(failed),
            "kept": len(kept),
            "images": len({finding.images for finding in kept}),
        },
        "failed": failed,
        "right": numbers(right.interval(lambda mean: mean)),
        "lengths": {segment: [finding.lengths[segment] for finding in kept] for segment in SEGMENTS},
        **study.experiment.sum_up(kept, settings["layers"], study.seed),
    }
