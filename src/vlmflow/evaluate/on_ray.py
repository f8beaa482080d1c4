"""Shards shared by many machines: an actor pool of Ray Data, which schedules, retries and restarts.

The driver keeps the rows and holds no model. Each worker loads the model and the task by itself, so that shards travel
as numbers and rows as text; a worker that would answer under other settings than the run's refuses.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlmflow.evaluate.model_facts import ModelFacts
from vlmflow.evaluate.runner import Job, R, Workers
from vlmflow.evaluate.shards import Shard
from vlmflow.models import VLM, load
from vlmflow.records.files import RecordError
from vlmflow.records.folder import differences
from vlmflow.tasks import Sample

OBJECT_STORE = 256 * 2**20  # bytes, where the cluster is made here


@dataclass(frozen=True)
class Loading:
    """How a worker gets its model: ``path`` as ``load`` takes it, ``name`` as records call it."""

    name: str
    path: str
    device: str | None = None
    dtype: str = "auto"
    revision: str | None = None

    @classmethod
    def named(cls, name: str, device: str | None, dtype: str, revision: str | None = None) -> Loading:
        """By a name that is known here; workers need not start in the same folder."""
        return cls(name, str(Path(name).resolve()) if Path(name).is_dir() else name, device, dtype, revision)

    def load(self) -> VLM:
        """The model."""
        return replace(load(self.path, self.device, self.dtype, revision=self.revision), name=self.name)


class Pool(Workers):
    """So many workers with a model each, in the cluster that this process is connected to.

    ``gpus`` is what each has to itself; below one, workers share.
    """

    def __init__(self, workers: int, gpus: float, loading: Loading) -> None:
        self.workers, self.gpus, self.loading = workers, gpus, loading
        self.where = {"device": "ray", "workers": workers, "gpus_per_worker": gpus}

    @cached_property
    def facts(self) -> ModelFacts:
        """The model's, read off it on one of the machines that will run it."""
        import ray

        with _one_line():
            return ray.get(ray.remote(_describe).options(num_gpus=self.gpus).remote(self.loading))

    def make_rows(self, job: Job[R], samples: Sequence[Sample], shards: Sequence[Shard]) -> Iterator[list[R]]:
        """The rows of shards, as workers finish them; what a worker held that died is done by another.

        Raises:
            RecordError: a worker cannot load what it needs, or has other versions, weights or samples.
        """
        import ray.data

        if not shards:
            return
        todo = [{"shard": json.dumps(asdict(shard))} for shard in shards]
        with _one_line():
            done = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
                Worker,
                fn_constructor_args=(self.loading, job, job.settings(self.facts, samples)),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(self.workers, len(todo))),
                num_gpus=self.gpus,
            )
            for block in done.iter_batches(batch_size=None, prefetch_batches=0):
                for rows in block["rows"]:
                    yield [job.row_type.from_dict(record) for record in json.loads(rows)]


class Worker:
    """An actor of the pool, with a model."""

    def __init__(self, loading: Loading, job: Job[Any], settings: dict[str, Any]) -> None:
        self._vlm, self._job, self._samples = loading.load(), job, job.samples()
        here = job.settings(ModelFacts.of(self._vlm), self._samples)
        if differing := differences(settings, here):
            raise RecordError(f"on {platform.node()} the settings would be others: {'; '.join(differing)}")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Make the rows of shards."""
        shards = [Shard.from_dict(json.loads(text)) for text in batch["shard"]]
        made = self._job.make_rows(self._vlm, self._samples, shards)
        return {"rows": [json.dumps([row.to_dict() for row in rows]) for rows in made]}


def _describe(loading: Loading) -> ModelFacts:
    return ModelFacts.of(loading.load())


@contextmanager
def connected(loading: Loading, workers: int, gpus: float | None = None, address: str | None = None) -> Iterator[Pool]:
    """A pool on this machine or, by an address, on a cluster that runs; ``gpus`` is by default one where it has any.

    Raises:
        RecordError: Ray is not installed, nothing answers at the address, or the cluster is too small.
    """
    if workers < 1:
        raise RecordError(f"workers must be at least 1, got {workers}")
    if gpus is not None and not gpus >= 0:  # nan is neither
        raise RecordError(f"GPUs a worker must be 0 or more, got {gpus:g}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked the user
    try:
        import ray
        import ray.data
    except ImportError:
        raise RecordError('Ray is not installed: pip install "vlmflow[ray]"') from None
    if address is None:
        ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE, **_QUIET)
    else:
        _check_reachable(address)
        with _one_line():
            ray.init(address, **_QUIET)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False  # the run has its own
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        there = ray.cluster_resources()
        each = min(1.0, there.get("GPU", 0)) if gpus is None else gpus
        kind, needed = ("GPU", workers * each) if each else ("CPU", workers)
        if there.get(kind, 0) < needed:
            raise RecordError(f"{workers} workers need {needed:g} {kind}s; the cluster has {there.get(kind, 0):g}")
        yield Pool(workers, each, loading)
    finally:
        ray.shutdown()


_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes, and then ends the process."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if "//" in address or not host or not port.isdigit():
        raise RecordError(f"a cluster's address is auto or host:port, such as 10.0.0.1:6379, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise RecordError(f"no Ray cluster answers at {address} ({error.strerror or error})") from None


@contextmanager
def _one_line() -> Iterator[None]:
    """Ray puts the worker's whole stack before what was wrong there."""
    import ray.exceptions

    try:
        yield
    except (ray.exceptions.RayError, ConnectionError) as error:
        last = str(error).strip().split("\n")[-1]
        raise RecordError(f"Ray: {re.sub(_MODULE, '', last)}") from error


_MODULE = re.compile(r"^[\w.]+[.](?=\w+: )")  # of an exception's full name
