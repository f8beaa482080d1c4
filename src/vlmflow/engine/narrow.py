"""What layers behind a drop are told: the positions that are left, and masks, tables, ids and slots for just these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from vlmflow.core.attention import causal_mask, select_mask, take_sequence
from vlmflow.core.select import right_align
from vlmflow.engine.cache import (
    UNUSED,
    CacheLayer,
    Slots,
    capacity,
    check_kind,
    expect,
    layer_of,
    physical_length,
    slots_of,
)
from vlmflow.engine.target import Target


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

    first: int  # the layer before which the drop was; 0, before any
    past: int  # logical positions already in the cache
    selections: Sequence[Selection]  # what enters each layer, the whole prompt first
    held: dict[int, Slots]  # by layer, what its cache will hold; layers that were told are entered
    target: Target
    is_flash: bool  # whether the kernel takes 2-D padding masks
    _made: dict[tuple[str, int, int], tuple[Any, Any]] = field(default_factory=dict)

    @property
    def selection(self) -> Selection:
        """The positions that are left."""
        return self.selections[self.first]

    @property
    def length(self) -> int:
        """Positions of the whole prompt."""
        return self.selections[0].index.shape[1]

    def tell(self, layer_idx: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A layer's keyword arguments for the positions that are left.

        Raises:
            ValueError: an argument, a window or a cache of a form that cannot be cut.
        """
        source = self.target.sources[layer_idx]
        layer = layer_of(kwargs.get("past_key_values"), source)
        if not self.first and slots_of(layer) is None:
            return kwargs
        mask, place = kwargs.get("attention_mask"), kwargs.get("cache_position")
        own = "attention_mask", "cache_position"
        told = {name: self._shortened(name, value) for name, value in kwargs.items() if name not in own}
        if not self.target.attends[layer_idx]:
            return told | {"attention_mask": self._rows(mask)}
        self._refuse(layer)
        if source == layer_idx:
            slots = self.held[layer_idx] = self.slots(layer)
            if slots_of(layer) is not None:
                expect(layer)
        else:
            slots = self._view(layer_idx, source, layer)
        told["attention_mask"] = self._once("mask", mask, slots, lambda: self._mask(mask, layer, slots, source))
        if place is not None:
            told["cache_position"] = self._once("place", slots, None, lambda: self._place(slots, place.device))
        return told

    def slots(self, layer: CacheLayer | None) -> Slots:
        """What a layer's cache will hold after this pass."""
        before = slots_of(layer) if self.past else None
        return self._once("slots", before, None, lambda: self._slots(self.selection, before, layer))

    def _place(self, slots: Slots, device: torch.device) -> Tensor:
        """Until transformers 5.4: the slots to write to."""
        return torch.arange(slots.length - self.selection.index.shape[1], slots.length, device=device)

    def _refuse(self, layer: CacheLayer | None) -> None:
        if layer is None:
            return
        check_kind(layer)
        if self.is_flash and layer.is_sliding:
            raise ValueError(
                "vlmflow: flash attention counts a sliding window in slots, which pruning widens; load the model with "
                'attn_implementation="sdpa"'
            )

    def _shortened(self, name: str, value: Any) -> Any:
        """An argument of a layer for the positions that are left, by its shape: every model has names of its own.

        Tables are (..., batch or 1, length, channel), ids (..., batch or 1, length), others (batch or 1, length, ...).
        """
        if isinstance(value, tuple | list):
            return type(value)(self._shortened(name, part) for part in value)
        if not isinstance(value, Tensor) or self.length not in value.shape:
            return value
        if name == "position_ids" and self.is_flash:
            return None  # ids with gaps would make flash attention see packed samples
        table = name.startswith("position_embeddings")
        axis = value.dim() - 2 if table else value.dim() - 1 if name == "position_ids" else 1
        if value.dim() <= axis or value.shape[axis] != self.length:
            raise ValueError(
                f"vlmflow: a decoder layer is given {name!r} of shape {tuple(value.shape)}, which holds something for "
                f"each of the prompt's {self.length} tokens in a way that is not known; this model cannot be pruned"
            )
        return self._once(name, value, None, lambda: self._take(value, axis))

    def _take(self, value: Tensor, axis: int) -> Tensor:
        """The positions that are left, of a tensor whose ``axis`` is the prompt and the one before it the batch."""
        index = self.selection.index.to(value.device)
        if value.dim() == 2:
            return torch.gather(value.expand(index.shape[0], -1), 1, index)
        if value.dim() == axis + 2:
            return take_sequence(value, index)
        flat = value.flatten(axis + 1) if value.dim() > axis + 2 else value[..., None]
        taken = take_sequence(flat, index)
        return taken.reshape(*taken.shape[: axis + 1], *value.shape[axis + 1 :])

    def _rows(self, mask: Tensor | None) -> Tensor | None:
        """A recurrent layer's mask: which of its rows are tokens."""
        now = self.selection
        if mask is None:
            return None if now.all_valid else now.valid
        return self._once("rows", mask, None, lambda: now.valid.to(mask.dtype))

    def _mask(self, mask: Tensor | None, layer: CacheLayer | None, slots: Slots, source: int) -> Tensor | None:
        """The mask that the model built for the whole prompt, narrowed to the rows and keys of a layer."""
        n_query, n_slots = self.selections[source].index.shape[1], capacity(layer)
        if mask is None or mask.dim() == 2:
            if slots.all_valid:
                return None
            if mask is not None or self.is_flash:
                return slots.valid
            if self.selection.index.shape[1] < n_query:  # its keys are those of more tokens than its rows
                row = self.past + self.selection.index
                return ((slots.position[:, None] <= row[..., None]) & slots.valid[:, None])[:, None]
            built = causal_mask(n_query, slots.valid)
            return built if n_slots is None else pad(built, (0, n_slots - slots.length))
        position, valid = slots.position, slots.valid
        if n_slots is not None:
            position, valid = slots.padded(n_slots)
        elif layer is not None and layer.is_sliding:
            stored = min(slots.length - n_query, layer.sliding_window - 1) + n_query
            position = position[:, -stored:] - (slots.logical_length - mask.shape[-1])
            valid = valid[:, -stored:]
        rows = self.selection.index if mask.shape[-2] == self.length else None  # Gemma 4 computes the last rows only
        return select_mask(mask, rows, position, valid)

    def _slots(self, now: Selection, before: Slots | None, layer: CacheLayer | None) -> Slots:
        position, valid, all_valid = torch.where(now.valid, self.past + now.index, UNUSED), now.valid, now.all_valid
        if self.past and before is None:
            past = torch.arange(self.past, device=position.device).expand(position.shape[0], -1)
            position, valid = torch.cat([past, position], 1), pad(valid, (self.past, 0), value=True)
        elif before is not None:
            past, past_valid = before.followed_by(physical_length(layer) - before.length, 0)
            position, valid = torch.cat([past, position], 1), torch.cat([past_valid, valid], 1)
            all_valid = all_valid and before.all_valid
        return Slots(position, valid, all_valid, self.past + self.length)

    def _view(self, layer_idx: int, source: int, layer: CacheLayer | None) -> Slots:
        """The slots of an earlier layer, as one sees them that reads its keys: less what was dropped since."""
        if source not in self.held:  # nothing was dropped ahead of it
            self.held[source] = self._slots(self.selections[0], None, layer)
        keys, now, before = self.held[source], self.selection, slots_of(layer)
        earlier = None if before is None else before.views.get(layer_idx)
        if self.first <= source and earlier is None:
            return keys
        if self.is_flash:
            raise ValueError(
                "vlmflow: flash attention cannot hide keys that a layer reads from an earlier one; load the model with "
                'attn_implementation="sdpa"'
            )
        end = self.past + self.length
        left = torch.zeros(now.index.shape[0], end + 1, dtype=torch.bool, device=now.index.device)
        left[:, : self.past] = True
        left = left.scatter(1, torch.where(now.valid, self.past + now.index, end), True)
        valid = keys.valid & torch.gather(left, 1, keys.position.clamp(max=end))
        if earlier is not None:
            valid = valid & pad(earlier.valid, (0, valid.shape[1] - earlier.length), value=True)
        view = Slots(keys.position, valid, False, keys.logical_length)
        keys.views[layer_idx] = view
        return view

    def _once(self, kind: str, given: Any, also: Any, make: Callable[[], Any]) -> Any:
        key = (kind, id(given), id(also))
        if key not in self._made:
            self._made[key] = ((given, also), make())  # holding what was given keeps its id from being used again
        return self._made[key][1]
