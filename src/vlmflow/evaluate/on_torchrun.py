"""Shards shared by the processes of one torchrun: each makes the rows of its own, the first keeps all rows.

They meet in the key-value store that torchrun itself keeps, so nobody waits for another before the end, and no
collective is needed. torchrun ends them all if one dies; the same command goes on from the rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed import is_torchelastic_launched
from torch.distributed.rendezvous import rendezvous

from vlmflow.evaluate.model_facts import ModelFacts
from vlmflow.evaluate.runner import Job, Progress, R, collect, machine
from vlmflow.evaluate.shards import Shard
from vlmflow.models import VLM
from vlmflow.tasks import Sample

LONGEST_SHARD = timedelta(days=7)  # the store gives up after minutes, else; a rank that died is torchrun's to notice


def own_accelerator() -> str | None:
    """The accelerator of this process among several on a machine; None where it is alone, or there is none."""
    kind = torch.accelerator.current_accelerator()
    return f"{kind.type}:{os.environ['LOCAL_RANK']}" if kind and "LOCAL_RANK" in os.environ else None


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started."""

    rank: int
    size: int
    store: Any  # torch's key-value store, whose type torch does not export

    @classmethod
    def launched(cls) -> Ranks | None:
        """None where torchrun did not start this process."""
        if not is_torchelastic_launched():
            return None
        store, rank, size = next(rendezvous("env://"))
        store.set_timeout(LONGEST_SHARD)
        return cls(rank, size, store)

    def run(
        self,
        vlm: VLM,
        job: Job[Any],
        out: Path,
        *,
        batch_size: int,
        samples: Sequence[Sample],
        progress: Progress,
    ) -> dict[str, Any] | None:
        """Do a job into a folder together (see ``collect``); the summary, None from all but the first."""
        if self.rank:
            return self._help(vlm, job, samples)
        make_rows = partial(self._make_rows, vlm, job, samples)
        where = machine(vlm) | {"processes": self.size}
        return collect(job, ModelFacts.of(vlm), samples, make_rows, out, batch_size, where, progress)

    def _make_rows(
        self, vlm: VLM, job: Job[R], samples: Sequence[Sample], shards: Sequence[Shard]
    ) -> Iterator[list[R]]:
        """The rows that the first process makes, and between them what the others have made."""
        self.store.set("shards", json.dumps([asdict(shard) for shard in shards]))
        queues = [list(range(rank, len(shards), self.size)) for rank in range(1, self.size)]
        for rows in job.make_rows(vlm, samples, shards[:: self.size]):
            yield rows
            for queue in queues:
                while queue and self.store.check([_key(queue[0])]):
                    yield self._take(job, queue.pop(0))
        for queue in queues:
            yield from (self._take(job, number) for number in queue)

    def _take(self, job: Job[R], number: int) -> list[R]:
        rows = [job.row_type.from_dict(record) for record in json.loads(self.store.get(_key(number)))]
        self.store.delete_key(_key(number))
        return rows

    def _help(self, vlm: VLM, job: Job[Any], samples: Sequence[Sample]) -> None:
        shards = [Shard.from_dict(record) for record in json.loads(self.store.get("shards"))]
        mine = range(self.rank, len(shards), self.size)
        for number, rows in zip(mine, job.make_rows(vlm, samples, shards[self.rank :: self.size]), strict=True):
            self.store.set(_key(number), json.dumps([row.to_dict() for row in rows]))


def _key(number: int) -> str:
    return f"rows of {number}"
