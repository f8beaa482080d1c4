"""The one loop: rows are kept as they come, from whoever makes them, and summed up at the end.

A `Job` says what is done: an evaluation (`Evaluation`), a study of the flow (`vlmflow.flow.study.Study`). It is done by
this process (`run`), by those of one torchrun (`on_torchrun`) or by Ray's workers (`on_ray`); all keep their rows here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
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
RowMaker = Callable[[Sequence[Shard]], Iterator[list[R]]]  # the wanted rows of each shard, in whichever order they come
Progress = Callable[[int, int, SampleRow | None], None]  # rows done, of how many, and the one that came; None to begin


@runtime_checkable
class Job(Protocol[R]):
    """What is done with every sample of a task, and what is made of the rows."""

    @property
    def row_type(self) -> type[R]:
        """The kind of its rows."""
        ...

    def samples(self) -> list[Sample]:
        """The samples.

        Raises:
            TaskError: what is wrong with the source.
            RecordError: a sample that is none for this job.
        """
        ...

    def settings(self, facts: ModelFacts, samples: Sequence[Sample]) -> dict[str, Any]:
        """All that the rows depend on, in JSON's own types.

        Raises:
            TaskError: unknown prompt style or answer rule.
            ValueError: what does not fit the model.
        """
        ...

    def make_rows(self, vlm: VLM, samples: Sequence[Sample], shards: Sequence[Shard]) -> Iterator[list[R]]:
        """The wanted rows of each shard, made here one shard after the other."""
        ...

    def sum_up(self, folder: OpenFolder, settings: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """The summary of the rows in a folder, one a sample and in the samples' order.

        Raises:
            RecordError: nothing is left to sum up.
        """
        ...


def unseen(done: int, total: int, row: SampleRow | None) -> None:
    """The progress that nobody follows."""


def run(
    vlm: VLM,
    job: Job[Any],
    out: Path,
    *,
    batch_size: int = 8,
    samples: Sequence[Sample] | None = None,
    progress: Progress = unseen,
) -> dict[str, Any]:
    """Do a job into a folder, or go on where a run with the same settings stopped; the summary.

    ``samples`` saves loading them once more where many jobs share them. The rest is as in ``collect``.
    """
    samples = job.samples() if samples is None else samples
    make_rows = partial(job.make_rows, vlm, samples)
    return collect(job, ModelFacts.of(vlm), samples, make_rows, out, batch_size, machine(vlm), progress)


def collect(
    job: Job[R],
    facts: ModelFacts,
    samples: Sequence[Sample],
    make_rows: RowMaker[R],
    out: Path,
    batch_size: int,
    where: Mapping[str, Any],
    progress: Progress = unseen,
) -> dict[str, Any]:
    """Keep the rows as they come from wherever they are made, and sum them up; the summary.

    Shards are ``batch_size`` consecutive samples, left-padded. One that was cut short is asked whole again, so that
    a run that was killed ends as one that was not. Samples that failed are tried again when the run is started again.
    ``where`` is for the log.

    Raises:
        TaskError: what is wrong with the source, the prompt style or the answer rule.
        RecordError: the folder holds another run, too many samples in a row have failed, or nothing is left to sum up.
            Rows stay.
        ValueError: settings, a pruner or a model that do not fit (see ``attach``).
    """
    if batch_size < 1:
        raise RecordError(f"batch_size must be at least 1, got {batch_size}")
    settings = job.settings(facts, samples)
    with claim(out, settings) as folder:
        rows = RowFile(out / ROWS, job.row_type)
        known = {key for key, row in rows.read().items() if row.failure is None}
        shards = missing_shards(samples, known, batch_size)
        done, start = len(known), time.time()
        progress(done, len(samples), None)
        if shards:
            (out / SUMMARY).unlink(missing_ok=True)  # it would not be that of the rows to come
            folder.log({"event": "start", "time": start, "done": done, "batch_size": batch_size, **where})
        failures = 0
        for made in make_rows(shards):
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
        summary = job.sum_up(folder, folder.settings(), facts)
        write_json(out / SUMMARY, summary)
        return json.loads(json.dumps(summary))


def machine(vlm: VLM) -> dict[str, Any]:
    """Where a model runs, for the log."""
    device = vlm.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": str(device), "machine": name}
