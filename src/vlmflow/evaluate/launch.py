"""Who does an evaluation: this process, torchrun's processes, or Ray's workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmflow.evaluate.on_ray import Loading, connected
from vlmflow.evaluate.on_torchrun import Ranks, own_accelerator
from vlmflow.evaluate.runner import Evaluation, Progress, run
from vlmflow.models import load
from vlmflow.tasks import Sample


@dataclass(frozen=True)
class RayWorkers:
    """So many workers of Ray's, as ``connected`` takes them."""

    workers: int = 1
    gpus: float | None = None
    address: str | None = None


def launch(
    evaluation_for: Callable[[int], Evaluation],
    loading: Loading,
    out: Path,
    on_ray: RayWorkers | None,
    *,
    batch_size: int,
    samples: Sequence[Sample],
    progress: Progress,
) -> dict[str, Any] | None:
    """Evaluate what may depend on the model's number of layers; the summary, None from all but torchrun's first.

    Raises:
        ValueError: a model that cannot be loaded as asked; the rest is as in ``collect`` and ``connected``.
    """
    if on_ray is not None:
        with connected(loading, on_ray.workers, on_ray.gpus, on_ray.address) as pool:
            subject = pool.describe()
            evaluation = evaluation_for(subject.layers)
            return pool.run(subject, evaluation, out, batch_size=batch_size, samples=samples, progress=progress)
    ranks = Ranks.launched()
    if ranks is None:
        vlm = load(loading.name, loading.device, loading.dtype)
        evaluation = evaluation_for(vlm.n_layers)
        return run(vlm, evaluation, out, batch_size=batch_size, samples=samples, progress=progress)
    if loading.device == "auto":
        raise ValueError("--device auto spreads one model over all accelerators; torchrun wants one in each")
    vlm = load(loading.name, loading.device or own_accelerator(), loading.dtype)
    evaluation = evaluation_for(vlm.n_layers)
    return ranks.run(vlm, evaluation, out, batch_size=batch_size, samples=samples, progress=progress)
