"""Who answers: this process alone, the processes of one torchrun, or Ray's workers. It is decided here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from vlmflow.evaluate.on_ray import Loading, connected
from vlmflow.evaluate.on_torchrun import Ranks, own_accelerator
from vlmflow.evaluate.runner import run
from vlmflow.models import VLM, load
from vlmflow.records.files import RecordError


@dataclass(frozen=True)
class Fleet:
    """The workers that Ray is to start (see ``connected``)."""

    workers: int = 1
    gpus: float | None = None
    address: str | None = None


@dataclass(frozen=True)
class Launched:
    """A loaded model, wherever it is: its number of layers, and ``run``, which evaluates it there.

    ``run`` takes what ``runner.run`` takes after the model. It returns the summary, or None in a process that only
    helps the one that keeps the results.
    """

    layers: int
    run: Callable[..., dict[str, Any] | None]


@contextmanager
def launch(model: str, device: str | None, dtype: str, fleet: Fleet | None = None) -> Iterator[Launched]:
    """Load a model where it is to answer: with Ray if there is a fleet, else here, or in each process of a torchrun.

    Raises:
        ModelError: the model cannot be loaded.
        RecordError: Ray cannot give the fleet, or the model cannot be loaded there.
    """
    if fleet is not None:
        with connected(Loading.named(model, device, dtype), fleet.workers, fleet.gpus, fleet.address) as pool:
            subject = pool.describe()
            yield Launched(subject.layers, partial(pool.run, subject))
    elif (ranks := Ranks.launched()) is not None:
        if device == "auto":
            raise RecordError("device auto spreads one model over all accelerators; torchrun wants one in each")
        vlm: VLM = load(model, device or own_accelerator(), dtype)
        yield Launched(vlm.n_layers, partial(ranks.run, vlm))
    else:
        vlm = load(model, device, dtype)
        yield Launched(vlm.n_layers, partial(run, vlm))
