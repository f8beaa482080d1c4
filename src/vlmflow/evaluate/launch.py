"""Who does a job: this process, torchrun's processes, or Ray's workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch.distributed import is_torchelastic_launched

from vlmflow.evaluate.on_ray import Loading, Pool
from vlmflow.evaluate.on_torchrun import Ranks, own_accelerator
from vlmflow.evaluate.runner import Job, Progress, collect, run
from vlmflow.models import load, read_attends
from vlmflow.tasks import Sample


def launch(
    job_for: Callable[[Sequence[bool]], Job[Any]],
    loading: Loading,
    out: Path,
    on_ray: AbstractContextManager[Pool] | None,
    *,
    batch_size: int,
    samples: Sequence[Sample],
    progress: Progress,
) -> dict[str, Any] | None:
    """Do a job, which may hang on which of the model's layers attend; the summary, None from all but torchrun's first.

    ``on_ray`` is what ``connected`` gives.

    Raises:
        ValueError: a model that cannot be loaded as asked; the rest is as in ``collect`` and ``connected``.
    """
    if on_ray is not None:
        with on_ray as pool:
            job = job_for(pool.facts.attends)
            return collect(pool, job, out, batch_size=batch_size, samples=samples, progress=progress)
    if is_torchelastic_launched() and loading.device == "auto":
        raise ValueError("--device auto spreads one model over all accelerators; torchrun wants one in each")
    attends = read_attends(loading.name, loading.revision)
    job = job_for(attends)
    job.check(len(attends))  # before weights are loaded
    if not is_torchelastic_launched():
        vlm = load(loading.name, loading.device, loading.dtype, revision=loading.revision)
        return run(vlm, job, out, batch_size=batch_size, samples=samples, progress=progress)
    ranks = Ranks(load(loading.name, loading.device or own_accelerator(), loading.dtype, revision=loading.revision))
    if ranks.rank:
        return ranks.help(job, samples)
    return collect(ranks, job, out, batch_size=batch_size, samples=samples, progress=progress)
