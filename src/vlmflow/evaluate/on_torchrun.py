"""Shards answered by the processes of one torchrun: each answers its share, the first keeps all rows.

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

from vlmflow.evaluate.rows import Row
from vlmflow.evaluate.runner import Evaluation, Progress, Shard, Subject, answers, collect, machine
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
        evaluation: Evaluation,
        out: Path,
        *,
        batch_size: int,
        samples: Sequence[Sample],
        progress: Progress,
    ) -> dict[str, Any] | None:
        """Evaluate into a folder together (see ``collect``); the summary, None from all but the first."""
        evaluation.pruner.checked_stages(vlm.n_layers, 0)
        if self.rank:
            return self._help(vlm, evaluation, samples)
        answering = partial(self._answers, vlm, evaluation, samples)
        where = machine(vlm) | {"processes": self.size}
        return collect(Subject.of(vlm), answering, evaluation, samples, out, batch_size, where, progress)

    def _answers(
        self, vlm: VLM, evaluation: Evaluation, samples: Sequence[Sample], shards: Sequence[Shard]
    ) -> Iterator[list[Row]]:
        """The first one's own rows, and between them what the others have done."""
        self.store.set("shards", json.dumps([asdict(shard) for shard in shards]))
        queues = [list(range(rank, len(shards), self.size)) for rank in range(1, self.size)]
        for rows in answers(vlm, evaluation, samples, shards[:: self.size]):
            yield rows
            for queue in queues:
                while queue and self.store.check([_key(queue[0])]):
                    yield self._take(queue.pop(0))
        for queue in queues:
            yield from map(self._take, queue)

    def _take(self, number: int) -> list[Row]:
        rows = [Row.from_dict(record) for record in json.loads(self.store.get(_key(number)))]
        self.store.delete_key(_key(number))
        return rows

    def _help(self, vlm: VLM, evaluation: Evaluation, samples: Sequence[Sample]) -> None:
        shards = [Shard.from_dict(record) for record in json.loads(self.store.get("shards"))]
        mine = range(self.rank, len(shards), self.size)
        for number, rows in zip(mine, answers(vlm, evaluation, samples, shards[self.rank :: self.size]), strict=True):
            self.store.set(_key(number), json.dumps([row.to_dict() for row in rows]))


def _key(number: int) -> str:
    return f"rows of {number}"
