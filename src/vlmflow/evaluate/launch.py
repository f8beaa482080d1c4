"""Who does a job: this process, torchrun's processes, or Ray's workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmflow.evaluate.on_ray import Loading, connected
from vlmflow.evaluate.on_torchrun import Ranks, own_accelerator
from vlmflow.evaluate.runner import Job, Progress, run
from vlmflow.models import load
from vlmflow.tasks import Sample


@dataclass(frozen=True)
class RayWorkers:
    """So many workers of Ray's, as ``connected`` takes them."""

    workers: int = 1
    gpus: float | None = None
    address: str | None = None


def launch(
    job_for: Callable[[int], Job[Any]],
    loading: Loading,
    out: Path,
    on_ray: RayWorkers | None,
    *,
    batch_size: int,
    samples: Sequence[Sample],
    progress: Progress,
) -> dict[str, Any] | None:
    """Do a job, which may hang on the model's number of layers; the summary, None from all but torchrun's first.

    Raises:
        ValueError: a model that cannot be loaded as asked; the rest is as in ``collect`` and ``connected``.
    """
    if on_ray is not None:
        with connected(loading, on_ray.workers, on_ray.gpus, on_ray.address) as pool:
            facts = pool.describe()
            job = job_for(facts.layers)
            return pool.run(facts, job, out, batch_size=batch_size, samples=samples, progress=progress)
    ranks = Ranks.launched()
    if ranks is None:
        vlm = load(loading.name, loading.device, loading.dtype)
        return run(vlm, job_for(vlm.n_layers), out, batch_size=batch_size, samples=samples, progress=progress)
    if loading.device == "auto":
        raise ValueError("--device auto spreads one model over all accelerators; torchrun wants one in each")
    vlm = load(loading.name, loading.device or own_accelerator(), loading.dtype)
    return ranks.run(vlm, job_for(vlm.n_layers), out, batch_size=batch_size, samples=samples, progress=progress)
