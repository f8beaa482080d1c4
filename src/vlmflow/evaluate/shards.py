"""Consecutive samples that are answered in one padded batch, and their images, opened in good time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vlmflow.core.errors import typed_line
from vlmflow.models import Question
from vlmflow.tasks import Sample, Task

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """The samples from the ``first`` to the one before ``end``; of those in ``missing``, by id, rows are wanted."""

    first: int
    end: int
    missing: tuple[str, ...]

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Shard:
        """From its fields in JSON's types."""
        return cls(record["first"], record["end"], tuple(record["missing"]))


def missing_shards(samples: Sequence[Sample], done: Collection[str], batch_size: int) -> list[Shard]:
    """The shards of which rows are missing; a batch is the same one in every run, so that its answers are too."""
    shards = []
    for first in range(0, len(samples), batch_size):
        batch = samples[first : first + batch_size]
        missing = tuple(sample.id for sample in batch if sample.id not in done)
        if missing:
            shards.append(Shard(first, first + len(batch), missing))
    return shards


@dataclass(frozen=True)
class Batch:
    """A shard's samples with their images open: by sample id the questions, and why others cannot be asked."""

    samples: Sequence[Sample]
    wanted: Sequence[Sample]  # those whose rows are missing
    questions: dict[str, Question] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, shard: Shard, samples: Sequence[Sample], task: Task, style: str | None) -> Batch:
        """Read a shard's images, and put the task's question to each sample."""
        members = samples[shard.first : shard.end]
        batch = cls(members, [sample for sample in members if sample.id in shard.missing])
        for sample in members:
            prompt = task.prompt(sample, style)
            try:
                batch.questions[sample.id] = Question(prompt, tuple(picture.open() for picture in sample.images))
            except Exception as error:  # whatever an image reader raises: this sample has failed
                batch.failures[sample.id] = typed_line(error)
        return batch

    def ask(
        self, ask: Callable[[Sequence[Sample], Sequence[Question]], Sequence[T]]
    ) -> tuple[dict[str, T], dict[str, str]]:
        """What ``ask`` says to the questions, all at once or, where that fails, one by one; and why some failed.

        Both go by sample id. The whole batch is asked even if one row is wanted, so that the answer is the same one.
        """
        answers: dict[str, T] = {}
        failures = dict(self.failures)
        if all(sample.id in failures for sample in self.wanted):
            return answers, failures
        able = [sample for sample in self.samples if sample.id in self.questions]
        for part in (able, *([sample] for sample in able)):
            if part[0].id in answers or part[0].id in failures:
                continue
            try:
                said = ask(part, [self.questions[sample.id] for sample in part])
                answers |= zip((sample.id for sample in part), said, strict=True)
            except Exception as error:  # too little memory, a processor that refuses: which sample, shows by itself
                if len(part) == 1:
                    failures[part[0].id] = typed_line(error)
        return answers, failures


def open_shards(shards: Sequence[Shard], samples: Sequence[Sample], task: Task, style: str | None) -> Iterator[Batch]:
    """The shards' batches, one after the other; the next one's images are opened meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        opening = (pool.submit(Batch.open, shard, samples, task, style) for shard in shards)
        following = next(opening, None)
        while following is not None:
            batch, following = following.result(), next(opening, None)
            yield batch
