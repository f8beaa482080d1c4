"""Shards shared by the processes of one torchrun: each makes the rows of its shards, the first keeps all.

They meet in the key-value store that torchrun itself keeps, so nobody waits for another before the end, and no
collective is needed. torchrun ends them all if one dies; the same command goes on from the rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.rendezvous import rendezvous

from vlmflow.evaluate.runner import Here, Job, R
from vlmflow.evaluate.shards import Shard
from vlmflow.models import VLM
from vlmflow.tasks import Sample

LONGEST_SHARD = timedelta(days=7)  # the store gives up after minutes, else; a rank that died is torchrun's to notice


def own_accelerator() -> str | None:
    """The accelerator of this process among several on a machine; None where it is alone, or there is none."""
    kind = torch.accelerator.current_accelerator()
    return f"{kind.type}:{os.environ['LOCAL_RANK']}" if kind and "LOCAL_RANK" in os.environ else None


class Ranks(Here):
    """This process, with its model, among those that torchrun started; the first of them keeps the rows."""

    def __init__(self, vlm: VLM) -> None:
        super().__init__(vlm)
        self._store, self.rank, self._size = next(rendezvous("env://"))
        self._store.set_timeout(LONGEST_SHARD)
        self.where |= {"processes": self._size}

    def make_rows(self, job: Job[R], samples: Sequence[Sample], shards: Sequence[Shard]) -> Iterator[list[R]]:
        """The rows that the first process makes, and between them what the others have made."""
        self._store.set("shards", json.dumps([asdict(shard) for shard in shards]))
        queues = [list(range(rank, len(shards), self._size)) for rank in range(1, self._size)]
        for rows in job.make_rows(self.vlm, samples, shards[:: self._size]):
            yield rows
            for queue in queues:
                while queue and self._store.check([_key(queue[0])]):
                    yield self._take(job, queue.pop(0))
        for queue in queues:
            yield from (self._take(job, number) for number in queue)

    def _take(self, job: Job[R], number: int) -> list[R]:
        rows = [job.row_type.from_dict(record) for record in json.loads(self._store.get(_key(number)))]
        self._store.delete_key(_key(number))
        return rows

    def help(self, job: Job[Any], samples: Sequence[Sample]) -> None:
        """Make the rows that fall to a process that is not the first."""
        shards = [Shard.from_dict(record) for record in json.loads(self._store.get("shards"))]
        numbers = range(self.rank, len(shards), self._size)
        made = job.make_rows(self.vlm, samples, shards[self.rank :: self._size])
        for number, rows in zip(numbers, made, strict=True):
            self._store.set(_key(number), json.dumps([row.to_dict() for row in rows]))


def _key(number: int) -> str:
    return f"rows of {number}"
