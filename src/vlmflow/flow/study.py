"""A study of the flow: drop the samples that need no image, look at the others one by one, and sum up.

A study is a job for `vlmflow.evaluate.runner`, as an evaluation is. What it looks at is an `Experiment`: a file of its
own, and a line in `vlmflow.flow.table`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from vlmflow.core.errors import typed_line
from vlmflow.core.layout import SEGMENTS
from vlmflow.core.statistics import clusters_of, share
from vlmflow.evaluate.evaluation import settings_of
from vlmflow.evaluate.model_facts import ModelFacts
from vlmflow.evaluate.shards import Shard, open_shards
from vlmflow.flow.prediction import Prediction, predict
from vlmflow.flow.verdict import in_markdown
from vlmflow.models import VLM, Question
from vlmflow.records.files import RecordError, write_text
from vlmflow.records.folder import ROWS, Folder, RowFile
from vlmflow.records.schema import StudyCounts, StudyRow, StudySummary, to_json
from vlmflow.tasks import Sample, Source, Task

VERDICT = "verdict.md"
GREY = (224, 224, 224)  # of a blank picture


@runtime_checkable
class Experiment(Protocol):
    """What is looked at in every sample, and what is made of it.

    Experiments are frozen dataclasses. ``name`` is also the command's, ``vlmflow flow NAME``; the docstring's first
    line is its help. Each field is an option: an int, float, str or ``Layers`` with a default, whose metadata has the
    ``help``, and the ``option``'s name where it is not the field's.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    name: ClassVar[str]
    summary_type: ClassVar[type[StudySummary]]

    def settings(self, n_layers: int) -> dict[str, Any]:
        """All that its numbers depend on, in JSON's own types.

        Raises:
            ValueError: what does not fit the model.
        """
        ...

    def examine(self, vlm: VLM, prediction: Prediction, seed: int) -> dict[str, Any]:
        """One sample's numbers, in JSON's own types."""
        ...

    def sum_up(self, rows: Sequence[StudyRow], n_layers: int, seed: int) -> dict[str, Any]:
        """The kept samples' numbers together: the summary's own fields, with the ``hypotheses``."""
        ...

    def verdict(self, summary: Any) -> list[str]:
        """What they mean, in sections of Markdown."""
        ...

    def figures(self, summary: Any, out: Path) -> list[str]:
        """Draw what they mean into a folder, as PNG and SVG; the files' names without ending."""
        ...


@dataclass(frozen=True)
class Study:
    """An experiment on the samples of a task; ``seed`` is that of the bootstrap and of random controls."""

    task: Task
    experiment: Experiment
    source: Source = field(default_factory=Source)
    limit: int | None = None
    seed: int = 0
    row_type = StudyRow

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

    def check(self, n_layers: int) -> None:
        """A ``ValueError`` where the experiment's settings do not fit."""
        self.experiment.settings(n_layers)

    def settings(self, facts: ModelFacts, samples: Sequence[Sample]) -> dict[str, Any]:
        """All that the numbers depend on; two runs with the same settings give the same summary.

        Raises:
            ValueError: settings of the experiment that do not fit the model.
        """
        return {
            "experiment": self.experiment.name,
            **self.experiment.settings(facts.layers),
            "without_image": "blank picture",
            **settings_of(facts, self.task, self.source, samples, {}, limit=self.limit, seed=self.seed),
        }

    def make_rows(self, vlm: VLM, samples: Sequence[Sample], shards: Sequence[Shard]) -> Iterator[list[StudyRow]]:
        """The wanted rows of each shard: blank pictures are asked about together, then each sample is looked at.

        Samples are dropped if the model answers them rightly about a blank picture as well (see ``blank``).
        """
        for batch in open_shards(shards, samples, self.task, None):
            blank_answers, failures = batch.ask(partial(self._blank_answers, vlm))
            yield [
                self._row(vlm, sample, batch.questions[sample.id], blank_answers[sample.id])
                if sample.id in blank_answers
                else StudyRow(sample.id, _names(sample), failure=failures[sample.id])
                for sample in batch.wanted
            ]

    def _blank_answers(self, vlm: VLM, samples: Sequence[Sample], questions: Sequence[Question]) -> list[str]:
        blanks = [Question(question.text, blank(question.images)) for question in questions]
        return [answer.text for answer in vlm.generate(vlm.encode(blanks), self.task.max_new_tokens)]

    def _row(self, vlm: VLM, sample: Sample, question: Question, blank_answer: str) -> StudyRow:
        """One sample's row; whatever goes wrong with it stands in the row."""
        images = _names(sample)
        try:
            if self.task.outcome(sample, blank_answer).score == 1:
                return StudyRow(sample.id, images, blank_answer, dropped=True)
            prediction = predict(vlm, question, sample.answer)
            return StudyRow(
                id=sample.id,
                images=images,
                blank_answer=blank_answer,
                target=prediction.target,
                right=int(prediction.logits.argmax()) == prediction.target,
                lengths={segment: len(prediction.layout.positions(segment)[0]) for segment in SEGMENTS},
                found=self.experiment.examine(vlm, prediction, self.seed),
            )
        except Exception as error:  # too little memory, a token outside the vocabulary: one sample's loss
            return StudyRow(sample.id, images, failure=typed_line(error))

    def sum_up(self, folder: Folder, settings: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """The summary of a folder's rows; the verdict is written beside it.

        Raises:
            RecordError: no row is left.
        """
        rows = list(RowFile(folder.path / ROWS, StudyRow).read().values())
        kept = [row for row in rows if row.kept]
        dropped = sum(row.dropped for row in rows)
        failed = {row.id: row.failure for row in rows if row.failure is not None}
        if not kept:
            reason = f" ({next(iter(failed.values()))})" if failed else ""
            raise RecordError(
                f"no sample is left: {dropped} of {len(rows)} were answered right about a blank picture as well, "
                f"{len(failed)} failed{reason}; take more samples, or others"
            )
        images = clusters_of([row.images for row in kept])
        summary = self.experiment.summary_type(
            settings=dict(settings),
            samples=StudyCounts(
                asked=len(rows),
                dropped=dropped,
                failed=len(failed),
                kept=len(kept),
                images=len({row.images for row in kept}),
            ),
            failed=failed,
            right=share(np.array([row.right for row in kept]), images),
            lengths={segment: [row.lengths[segment] for row in kept] for segment in SEGMENTS},
            **self.experiment.sum_up(kept, facts.layers, self.seed),
        )
        write_text(folder.path / VERDICT, in_markdown(summary, self.experiment.verdict(summary)))
        return to_json(summary)


def blank(images: Sequence[Image.Image]) -> tuple[Image.Image, ...]:
    """Pictures of the same sizes that show nothing.

    Source: appendix B, "removed the image information".
    Departs: it may mean a prompt without image tokens. Some models, pico among them, have never seen one and answer
    it with chance words, so that nothing would be dropped; about a blank picture they answer what can be guessed.
    """
    return tuple(Image.new("RGB", image.size, GREY) for image in images)


def _names(sample: Sample) -> tuple[str, ...]:
    """The names of a sample's images; samples of the same ones are not independent."""
    return tuple(picture.name for picture in sample.images)
