"""The one loop: rows are kept as they come, from whoever makes them, and summed up at the end.

A `Job` says what is done: an evaluation (`Evaluation`), a study of the flow (`vlmflow.flow.study.Study`). Workers do
it: this process (`Here`), those of one torchrun (`on_torchrun`) or Ray's (`on_ray`).
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from vlmflow.evaluate.model_facts import ModelFacts
from vlmflow.evaluate.shards import Shard, missing_shards
from vlmflow.models import VLM
from vlmflow.records.files import RecordError, write_json
from vlmflow.records.folder import ROWS, SUMMARY, FileRow, OpenFolder, RowFile, claim
from vlmflow.tasks import Sample

FAILURES_IN_A_ROW = 50  # after so many something is wrong with more than the samples


@runtime_checkable
class SampleRow(FileRow, Protocol):
    """What became of one sample."""

    @property
    def id(self) -> str:
        """The sample's id."""
        ...

    @property
    def failure(self) -> str | None:
        """Why there is nothing, None where it did not fail."""
        ...


R = TypeVar("R", bound=SampleRow)
Progress = Callable[[int, int, SampleRow | None], None]  # rows done, of how many, and the one that came; None to begin


@runtime_checkable
class Job(Protocol[R]):
    """What is done with every sample of a task, and what is made of the rows."""

    @property
    def row_type(self) -> type[R]:
        """The kind of its rows."""
        ...

    def samples(self) -> list[Sample]:
        """The samples; a ``ValueError`` where the source is wrong, or a sample is none for this job."""
        ...

    def check(self, n_layers: int) -> None:
        """A ``ValueError`` where it does not fit a model of so many layers."""
        ...

    def settings(self, facts: ModelFacts, samples: Sequence[Sample]) -> dict[str, Any]:
        """All that the rows depend on, in JSON's types; a ``ValueError`` where it does not fit task or model."""
        ...

    def make_rows(self, vlm: VLM, samples: Sequence[Sample], shards: Sequence[Shard]) -> Iterator[list[R]]:
        """The wanted rows of each shard, made here one shard after the other."""
        ...

    def sum_up(self, folder: OpenFolder, settings: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """The summary of the rows in a folder, which stand in the samples' order; a ``RecordError`` if none is left."""
        ...


class Workers(ABC):
    """Whoever makes rows, with one model or many alike; ``where`` says for the log who and how many they are."""

    where: dict[str, Any]

    @cached_property
    @abstractmethod
    def facts(self) -> ModelFacts:
        """Their model's."""

    @abstractmethod
    def make_rows(self, job: Job[R], samples: Sequence[Sample], shards: Sequence[Shard]) -> Iterator[list[R]]:
        """The wanted rows of each shard, in whichever order they come."""


class Here(Workers):
    """This process and its model."""

    def __init__(self, vlm: VLM) -> None:
        self.vlm, device = vlm, vlm.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.where = {"device": str(device), "machine": name}

    @cached_property
    def facts(self) -> ModelFacts:
        """The model's."""
        return ModelFacts.of(self.vlm)

    def make_rows(self, job: Job[R], samples: Sequence[Sample], shards: Sequence[Shard]) -> Iterator[list[R]]:
        """One shard after the other."""
        return job.make_rows(self.vlm, samples, shards)


def run(
    vlm: VLM,
    job: Job[Any],
    out: Path,
    *,
    batch_size: int = 8,
    samples: Sequence[Sample] | None = None,
    progress: Progress = lambda done, total, row: None,
) -> dict[str, Any]:
    """Do a job into a folder, or go on where a run with the same settings stopped; the summary.

    ``samples`` saves loading them once more where many jobs share them. The rest is as in ``collect``.
    """
    samples = job.samples() if samples is None else samples
    return collect(Here(vlm), job, out, batch_size=batch_size, samples=samples, progress=progress)


def collect(
    workers: Workers, job: Job[R], out: Path, *, batch_size: int, samples: Sequence[Sample], progress: Progress
) -> dict[str, Any]:
    """Keep the rows as they come from wherever they are made, and sum them up; the summary.

    Shards are ``batch_size`` consecutive samples, left-padded. One that was cut short is asked whole again, so that
    a run that was killed ends as one that was not. Samples that failed are tried again when the run is started again.

    Raises:
        TaskError: what is wrong with the source, the prompt style or the answer rule.
        RecordError: the folder holds another run or answers about other images, too many samples in a row have failed,
            or nothing is left to sum up. Rows stay.
        ValueError: settings, a pruner or a model that do not fit (see ``attach``).
    """
    if batch_size < 1:
        raise RecordError(f"batch_size must be at least 1, got {batch_size}")
    settings = job.settings(workers.facts, samples)
    with claim(out, settings) as folder:
        rows = RowFile(out / ROWS, job.row_type)
        known = {key for key, row in rows.read().items() if row.failure is None}
        folder.keep_pictures({sample.id: sample.digest for sample in samples}, known)
        shards = missing_shards(samples, known, batch_size)
        done, start = len(known), time.time()
        progress(done, len(samples), None)
        if shards:
            (out / SUMMARY).unlink(missing_ok=True)  # it would not be that of the rows to come
            folder.log({"event": "start", "time": start, "done": done, "batch_size": batch_size, **workers.where})
        failures = 0
        for made in workers.make_rows(job, samples, shards):
            rows.append(made)
            for row in made:
                done += 1
                failures = 0 if row.failure is None else failures + 1
                progress(done, len(samples), row)
            if failures >= FAILURES_IN_A_ROW:
                reason = made[-1].failure
                raise RecordError(f"{failures} samples in a row failed ({reason}); the rows so far are in {out}")
        if shards:
            folder.log({"event": "end", "time": time.time(), "done": done, "seconds": time.time() - start})
        rows.put_in_order([sample.id for sample in samples])
        summary = job.sum_up(folder, folder.settings(), workers.facts)
        write_json(out / SUMMARY, summary)
        return json.loads(json.dumps(summary))
