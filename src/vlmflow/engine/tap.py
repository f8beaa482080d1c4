"""Taps: code that takes part in chosen layers' attention, in prefill and through generation, pruned or not."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from vlmflow.core.layout import Layout
from vlmflow.engine.cache import UNUSED, CacheLayer, physical_length, slots_of
from vlmflow.engine.probe import KernelCall, Watcher


@dataclass(frozen=True)
class TappedCall:
    """One layer's attention, as a tap gets it.

    Positions count in the whole text, whatever was pruned; slots that hold nothing have ``UNUSED``. ``layout`` is that
    of the prompt, so positions beyond its length are generated tokens.
    """

    layer: int
    kernel: KernelCall
    query_position: Int[Tensor, "batch query"]
    key_position: Int[Tensor, "batch key"]
    layout: Layout


@runtime_checkable
class Tap(Protocol):
    """Something that takes part in the attention of its layers; it returns ``call.kernel.run()``, or something else."""

    @property
    def layers(self) -> Collection[int]:
        """The layers that it wants to see."""
        ...

    def __call__(self, call: TappedCall) -> tuple[Tensor, Any]:
        """Take the place of the layer's kernel."""
        ...


def tapped(tap: Tap, layer_idx: int, layout: Layout, positions: Int[Tensor, "batch position"], n_query: int) -> Watcher:
    """What watches a layer's kernel for a tap, where ``positions`` are all that the layer's keys stand for."""

    def watcher(call: KernelCall) -> tuple[Tensor, Any]:
        n_key, known = call.key.shape[2], positions
        if known.shape[1] < n_key:  # a static cache hands over its empty slots as well
            known = pad(known, (0, n_key - known.shape[1]), value=UNUSED)
        elif known.shape[1] > n_key:  # a sliding window has let go of the oldest
            known = known[:, known.shape[1] - n_key :]
        query = positions[:, positions.shape[1] - n_query :]
        return tap(TappedCall(layer_idx, call, query, known, layout))

    return watcher


def decode_positions(layer: CacheLayer, n_query: int, is_written: bool) -> Int[Tensor, "batch position"]:
    """The positions that a layer's keys will stand for once it has read ``n_query`` tokens, or when it has."""
    slots, past = slots_of(layer), physical_length(layer) - n_query * is_written
    if slots is not None:
        return slots.followed_by(past - slots.length, n_query)[0]
    return torch.arange(past + n_query, device=layer.keys.device).expand(layer.keys.shape[0], -1)
