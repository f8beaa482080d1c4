"""The attention that ranks image tokens, read as a layer computes it, or by running the layer ahead."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from vlmflow.core.attention import QueryRows
from vlmflow.core.select import right_align
from vlmflow.engine.cache import CacheLayer, capacity, layer_of, physical_length
from vlmflow.engine.narrow import Selection
from vlmflow.engine.probe import KernelCall, unwatch, watch
from vlmflow.engine.target import Target
from vlmflow.pruners import Pruner, Queries


@dataclass(frozen=True)
class Look:
    """Where the attention that ranks for a stage is seen."""

    layer: int
    queries: Queries
    is_ahead: bool  # whether the layer is run ahead of the drop, and not read as it computes

    @classmethod
    def all(cls, pruner: Pruner, target: Target) -> dict[int, Look]:
        """The looks of a pruner's stages, by the layer of the drop.

        Where a layer is recurrent, the nearest attention layer before it ranks in its place.

        Raises:
            ValueError: a stage with no attention layer between it and the stage before, or the start.
        """
        looks, since = {}, 0
        for stage in pruner.checked_stages(len(target.layers), 0):
            if stage.queries is not None:
                attending = [
                    layer_idx for layer_idx in range(since, stage.scored_layer + 1) if target.attends[layer_idx]
                ]
                if not attending:
                    raise ValueError(
                        f"vlmflow: {pruner} prunes before layer {stage.layer} by attention, but layers {since} to "
                        f"{stage.scored_layer} of this model are recurrent and have none; its attention layers are "
                        f"{', '.join(str(i) for i in range(len(target.layers)) if target.attends[i])}"
                    )
                looks[stage.layer] = cls(attending[-1], stage.queries, attending[-1] == stage.layer)
            since = stage.layer
        return looks


@dataclass
class Reading:
    """A watcher that takes the attention rows of a stage's queries from one layer's kernel."""

    rows: Int[Tensor, "batch row"]
    row_valid: Bool[Tensor, "batch row"]
    filled: int | None  # slots in use, of a static cache
    seen: QueryRows | None = None

    @classmethod
    def of(cls, queries: Queries, selection: Selection, layer: CacheLayer | None) -> Reading:
        """A reading of ``queries`` among the positions of ``selection``; ``layer`` is the watched layer's cache."""
        by_image = queries == "image"
        flags = selection.image if by_image else selection.question
        rows = right_align(flags, max(selection.image_tokens if by_image else selection.question_tokens))
        row_valid = torch.gather(flags, 1, rows)
        if queries == "last":
            rows, row_valid = rows[:, -1:], row_valid[:, -1:]
        return cls(rows, row_valid, None if capacity(layer) is None else physical_length(layer))

    def __call__(self, call: KernelCall) -> tuple[Tensor, Any]:
        """Take the rows, and let the call pass."""
        key = call.key
        if self.filled is not None:  # a static cache hands over its empty slots as well
            key = key[:, :, : self.filled + call.query.shape[2]]
        with torch.no_grad():
            self.seen = QueryRows.take(call.query, key, call.mask, self.rows, self.row_valid, call.scoring)
            if call.mask is not None and call.mask.dim() == 4:  # else every token sees itself
                self.seen.refuse_blind()
        return call.run()


class _Stopped(Exception):  # noqa: N818 (no error: it ends a call early)
    """Raised once a layer's q and k have been seen."""


def _stop(call: KernelCall) -> tuple[Tensor, Any]:
    raise _Stopped


def read_ahead(
    queries: Queries,
    selection: Selection,
    layer_idx: int,
    module: Any,
    hidden: Float[Tensor, "*streams batch length hidden"],
    kwargs: dict[str, Any],
) -> Reading:
    """Run a layer as far as its q and k, on a cache that may be written to (see ``shadow``)."""
    reading = Reading.of(queries, selection, layer_of(kwargs["past_key_values"], layer_idx))
    watch(module.self_attn, _stop)
    watch(module.self_attn, reading)
    try:
        with torch.no_grad():
            module.forward(hidden, **kwargs)
    except _Stopped:
        pass
    finally:
        unwatch(module.self_attn)
    return reading


def shadow(cache: Cache, layer_idx: int) -> Cache:
    """A cache that may be written to without a trace, as far as one layer is concerned."""
    copied = copy.copy(cache)
    copied.layers = list(cache.layers)
    copied.layers[layer_idx] = copy.deepcopy(cache.layers[layer_idx])
    return copied
