"""What layers behind a drop are told: the positions that are left, and masks, tables, ids and slots for just these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import StaticSlidingWindowLayer

from vlmflow.core.attention import causal_mask, select_mask, take_sequence
from vlmflow.core.select import right_align
from vlmflow.engine.cache import UNUSED, CacheLayer, Slots, capacity, layer_of, physical_length, slots_of

# packing cannot be pruned batch by batch
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True)
class Selection:
    """The prompt positions that the hidden states hold between two stages, right-aligned in a ragged batch.

    The counts live on the host, so that nothing after the prefill's first look at the prompt waits for the device.
    """

    index: Int[Tensor, "batch length"]  # position in the prompt
    valid: Bool[Tensor, "batch length"]
    image: Bool[Tensor, "batch length"]
    question: Bool[Tensor, "batch length"]
    tokens: tuple[int, ...]  # valid positions of each sample
    image_tokens: tuple[int, ...]
    question_tokens: tuple[int, ...]

    @property
    def all_valid(self) -> bool:
        """Whether no sample is filled up."""
        return all(count == self.index.shape[1] for count in self.tokens)

    def keep(
        self, keep: Bool[Tensor, "batch length"], image_tokens: tuple[int, ...]
    ) -> tuple[Selection, Int[Tensor, "batch kept"]]:
        """The same sequence without the positions whose flag is not set, and where in this one its positions are."""
        counts = zip(self.tokens, self.image_tokens, image_tokens, strict=True)
        tokens = tuple(count - old + new for count, old, new in counts)
        order = right_align(keep, max(tokens))
        valid = torch.gather(keep, 1, order)
        selection = Selection(
            index=torch.gather(self.index, 1, order),
            valid=valid,
            image=torch.gather(self.image, 1, order) & valid,
            question=torch.gather(self.question, 1, order) & valid,
            tokens=tokens,
            image_tokens=image_tokens,
            question_tokens=self.question_tokens,
        )
        return selection, order


@dataclass(frozen=True)
class Narrowing:
    """What layers are told from one drop to the next, in place of what the model made for the whole prompt.

    Each thing is made once, for all layers that are given the same.
    """

    selection: Selection
    past: int  # logical positions already in the cache
    length: int  # of the whole prompt
    is_flash: bool  # whether the kernel takes 2-D padding masks
    _made: dict[tuple[str, int], tuple[Any, Any]] = field(default_factory=dict)

    def tell(self, layer_idx: int, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Slots]:
        """A layer's keyword arguments for the positions that are left, and what its cache will then hold.

        Raises:
            ValueError: a sliding window that would be counted in slots.
        """
        layer = layer_of(kwargs.get("past_key_values"), layer_idx)
        self._refuse_window(layer)
        slots = self.slots(layer)
        mask, tables, ids = kwargs["attention_mask"], kwargs.get("position_embeddings"), kwargs.get("position_ids")
        told = {**kwargs, "attention_mask": self._once("mask", mask, lambda: self._mask(mask, layer, slots))}
        if tables is not None:  # rotated already: ids with gaps would only make flash attention see packed samples
            told |= {"position_embeddings": tuple(map(self._shorten, tables)), "position_ids": None}
        elif ids is not None:
            told["position_ids"] = self._shorten_ids(ids)
        if (place := kwargs.get("cache_position")) is not None:
            start, end = slots.length - self.selection.index.shape[1], slots.length
            told["cache_position"] = self._once("place", slots, lambda: torch.arange(start, end, device=place.device))
        for name in _PACKED:
            if kwargs.get(name) is not None:
                told[name] = None
        return told, slots

    def slots(self, layer: CacheLayer | None) -> Slots:
        """What a layer's cache will hold after this pass."""
        before = slots_of(layer) if self.past else None
        return self._once("slots", before, lambda: self._slots(before, layer))

    def _refuse_window(self, layer: CacheLayer | None) -> None:
        if isinstance(layer, StaticSlidingWindowLayer):
            raise ValueError(
                "vlmflow: a static cache with sliding-window layers cannot hold a pruned prompt; use the dynamic cache"
            )
        if self.is_flash and layer is not None and layer.is_sliding:
            raise ValueError(
                "vlmflow: flash attention counts a sliding window in slots, which pruning widens; load the model with "
                'attn_implementation="sdpa"'
            )

    def _shorten(self, table: Tensor) -> Tensor:
        """A table (..., batch or 1, prompt length, channel), for the positions that are left."""
        return self._once("table", table, lambda: take_sequence(table, self.selection.index))

    def _shorten_ids(self, ids: Tensor) -> Tensor:
        """Ids (..., batch or 1, prompt length), for the positions that are left."""
        return self._once("ids", ids, lambda: take_sequence(ids[..., None], self.selection.index)[..., 0])

    def _mask(self, mask: Tensor | None, layer: CacheLayer | None, slots: Slots) -> Tensor | None:
        """The mask that the model built for the whole prompt, narrowed to the rows and keys of a layer."""
        n_query, n_slots = self.selection.index.shape[1], capacity(layer)
        if mask is None or mask.dim() == 2:
            if slots.all_valid:
                return None
            if mask is not None or self.is_flash:
                return slots.valid
            built = causal_mask(n_query, slots.valid)
            return built if n_slots is None else pad(built, (0, n_slots - slots.length))
        position, valid = slots.position, slots.valid
        if n_slots is not None:
            position, valid = slots.padded(n_slots)
        elif layer is not None and layer.is_sliding:
            stored = min(slots.length - n_query, layer.sliding_window - 1) + n_query
            position = position[:, -stored:] - (slots.logical_length - mask.shape[-1])
            valid = valid[:, -stored:]
        return select_mask(mask, self.selection.index, position, valid)

    def _slots(self, before: Slots | None, layer: CacheLayer | None) -> Slots:
        now = self.selection
        position, valid, all_valid = torch.where(now.valid, self.past + now.index, UNUSED), now.valid, now.all_valid
        if self.past and before is None:
            past = torch.arange(self.past, device=position.device).expand(position.shape[0], -1)
            position, valid = torch.cat([past, position], 1), pad(valid, (self.past, 0), value=True)
        elif before is not None:
            past, past_valid = before.followed_by(physical_length(layer) - before.length, 0)
            position, valid = torch.cat([past, position], 1), torch.cat([past_valid, valid], 1)
            all_valid = all_valid and before.all_valid
        return Slots(position, valid, all_valid, self.past + self.length)

    def _once(self, kind: str, given: Any, make: Callable[[], Any]) -> Any:
        key = (kind, id(given))
        if key not in self._made:
            self._made[key] = (given, make())  # holding what was given keeps its id from being used again
        return self._made[key][1]
