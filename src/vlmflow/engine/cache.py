"""KV-cache layers that hold fewer slots than the text they stand for.

Everything that decoding needs to know about a pruned prompt lives here, on the cache layers: a cache can be copied,
cropped, expanded, reset or handed from turn to turn, and the hooks stay without state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from vlmflow.core.attention import causal_mask, select_mask

CacheLayer = Any  # transformers' classes of cache layers have no common type that names what they share
UNUSED = 2**62  # logical position of a slot that only pads: beyond every mask


@dataclass
class Slots:
    """Which logical position each physical slot of a pruned cache layer holds, right after the pruned prefill.

    Layers that were pruned together share one ``Slots``. Later tokens follow slot by slot and need no entry. Beam
    search may reorder the cache under it: the beams of a sample share their prompt, and so their slots.
    """

    position: Int[Tensor, "batch slot"]
    valid: Bool[Tensor, "batch slot"]
    all_valid: bool
    logical_length: int  # positions that the unpruned cache would hold
    _masks: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    _padded: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Physical slots."""
        return self.position.shape[1]

    @property
    def dropped(self) -> int:
        """How many slots fewer than positions."""
        return self.logical_length - self.length

    def __deepcopy__(self, memo: dict[int, Any]) -> Slots:
        return Slots(self.position, self.valid, self.all_valid, self.logical_length)  # its tensors never change

    def rows(self, index: Tensor) -> Slots:
        """The same slots for other batch rows."""
        return Slots(self.position[index], self.valid[index], self.all_valid, self.logical_length)

    def padded(self, capacity: int) -> tuple[Tensor, Tensor]:
        """Position and validity of all ``capacity`` slots of a static layer, those still to be filled included."""
        if capacity not in self._padded:
            batch = self.position.shape[0]
            ahead = torch.arange(capacity - self.length, device=self.position.device) + self.logical_length
            position = torch.cat([self.position, ahead.expand(batch, -1)], 1)
            self._padded[capacity] = (position, pad(self.valid, (0, capacity - self.length), value=True))
        return self._padded[capacity]

    def followed_by(self, n_new: int, n_query: int) -> tuple[Tensor, Tensor]:
        """Position and validity of the slots that ``n_query`` new tokens see, ``n_new`` tokens after the prefill.

        ``n_new`` is negative where the cache was cropped back into the prompt.

        Raises:
            RuntimeError: it was cropped into the part where tokens are missing.
        """
        position, valid = self.position, self.valid
        if n_new < 0:
            removed = torch.arange(self.logical_length + n_new, self.logical_length, device=position.device)
            if not (position[:, n_new:] == removed).all():
                raise RuntimeError(
                    "the KV cache was cropped back into the pruned part of the prompt, where its length no longer "
                    "tells which tokens are left; start again from an empty cache"
                )
            position, valid = position[:, :n_new], valid[:, :n_new]
        start = self.logical_length + min(0, n_new)
        ahead = torch.arange(start, self.logical_length + n_new + n_query, device=position.device)
        ahead = ahead.expand(position.shape[0], -1)
        return torch.cat([position, ahead], 1), torch.cat([valid, torch.ones_like(ahead, dtype=torch.bool)], 1)

    def tell(self, layer: CacheLayer, n_query: int, kwargs: dict[str, Any], is_flash: bool) -> dict[str, Any]:
        """A decoder layer's keyword arguments while decoding, for the slots that ``layer`` of the cache has."""
        mask, position = kwargs.get("attention_mask"), kwargs.get("cache_position")
        narrow = self._narrow(layer, mask, n_query, is_flash)
        if position is not None and (narrow is not mask or capacity(layer) is not None):
            kwargs = {**kwargs, "cache_position": position - self.dropped}  # until transformers 5.4, where to write
        return kwargs if narrow is mask else {**kwargs, "attention_mask": narrow}

    def _narrow(self, layer: CacheLayer, mask: Tensor | None, n_query: int, is_flash: bool) -> Tensor | None:
        """The mask of the whole text for the slots of ``layer``: made once a step for layers that share both."""
        if mask is None and self.all_valid:
            return None
        if torch.compiler.is_compiling() or mask is None:
            return self._narrowed(layer, mask, n_query, is_flash)
        known, narrow = self._masks.get(id(mask), (None, None))
        if known is not mask:
            if len(self._masks) > 4:  # one kind of mask a layer type; older ones belong to earlier steps
                self._masks.clear()
            narrow = self._narrowed(layer, mask, n_query, is_flash)
            self._masks[id(mask)] = (mask, narrow)
        return narrow

    def _narrowed(self, layer: CacheLayer, mask: Tensor | None, n_query: int, is_flash: bool) -> Tensor | None:
        if (n_slots := capacity(layer)) is not None:
            assert mask is not None, "a static cache always comes with a mask"
            return select_mask(mask, None, *self.padded(n_slots))
        position, valid = self.followed_by(physical_length(layer) - self.length, n_query)
        end = self.logical_length + physical_length(layer) - self.length + n_query
        if layer.is_sliding:
            stored = min(layer.keys.shape[-2], layer.sliding_window - 1) + n_query
            position, valid = position[:, -stored:], valid[:, -stored:]
        if mask is not None and mask.dim() == 4:
            return select_mask(mask, None, position - (end - mask.shape[-1]), valid)
        if self.all_valid:
            return None
        if is_flash or mask is not None:
            return valid
        return causal_mask(n_query, valid)


def layer_of(past_key_values: Cache | None, layer_idx: int) -> CacheLayer | None:
    """The cache's layer, or None where there is no cache or it has not grown that far."""
    if past_key_values is None or layer_idx >= len(past_key_values.layers):
        return None
    return past_key_values.layers[layer_idx]


def slots_of(layer: CacheLayer | None) -> Slots | None:
    """The slots of a pruned layer, None of any other."""
    return None if layer is None else vars(layer).get("vlmflow_slots")


def hold(past_key_values: Cache, held: dict[int, Slots]) -> None:
    """Turn layers that a pruned prefill has filled into ones that know their slots."""
    for layer_idx, slots in held.items():
        layer = layer_of(past_key_values, layer_idx)
        if layer is None:
            continue
        if slots_of(layer) is None:
            layer.__class__ = _pruned_class(type(layer))
        layer.vlmflow_slots = slots


def physical_length(layer: CacheLayer) -> int:
    """Tokens that a layer was given (a sliding layer may have let go of the oldest)."""
    return int(layer.get_seq_length()) if slots_of(layer) is None else layer.physical_length()


def capacity(layer: CacheLayer | None) -> int | None:
    """Slots that a static layer has from the start, None of a layer that grows."""
    return layer.max_cache_len if layer is not None and hasattr(layer, "max_cache_len") else None


@cache
def _pruned_class(cls: Any) -> Any:
    """A subclass that reports logical lengths outward, so that masks and positions are made for the whole text.

    Made for each layer class by single inheritance: only then may an instance change its class.
    """

    class Pruned(cls):
        _layer_type = None  # or transformers would register this class in place of its parent
        vlmflow_slots: Slots
        _physical = False

        def physical_length(self) -> int:
            return int(super().get_seq_length())

        def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
            length = super().get_seq_length(*args, **kwargs)
            return length if self._physical else length + self.vlmflow_slots.dropped

        def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
            if not self.is_sliding:
                return super().get_mask_sizes(*args, **kwargs)  # by get_seq_length(), or a static layer's capacity
            self.cumulative_length += self.vlmflow_slots.dropped
            try:
                return super().get_mask_sizes(*args, **kwargs)
            finally:
                self.cumulative_length -= self.vlmflow_slots.dropped

        def crop(self, length: int) -> None:
            """Negative: tokens to remove; positive (before transformers 5.16): the logical length to crop to."""
            self._physical = True
            try:
                super().crop(length - self.vlmflow_slots.dropped if length > 0 else length)
            finally:
                self._physical = False

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            batch = torch.arange(self.vlmflow_slots.position.shape[0], device=self.vlmflow_slots.position.device)
            self.vlmflow_slots = self.vlmflow_slots.rows(batch.repeat_interleave(repeats))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self.vlmflow_slots = self.vlmflow_slots.rows(indices)

        def reset(self) -> None:
            super().reset()
            self.__class__ = cls  # static caches are used again for the next prompt
            del self.vlmflow_slots

    Pruned.__name__ = Pruned.__qualname__ = f"Pruned{cls.__name__}"
    return Pruned
