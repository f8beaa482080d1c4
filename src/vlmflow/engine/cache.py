"""KV-cache layers that hold fewer slots than the text they stand for.

Everything that decoding needs to know about a pruned prompt lives here, on the cache layers: a cache can be copied,
cropped, expanded, reset or handed from turn to turn, and the hooks stay without state.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import cache_utils
from transformers.cache_utils import Cache

from vlmflow.core.attention import causal_mask, select_mask

CacheLayer = Any  # transformers' classes of cache layers have no common type that names what they share
UNUSED = 2**62  # logical position of a slot that only pads: beyond every mask
_KNOWN = ("DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer", "StaticLayer")  # classes that we can cut


@dataclass
class Slots:
    """Which logical position each physical slot of a pruned cache layer holds, right after the pruned prefill.

    Layers that were pruned together share one ``Slots``. Later tokens follow slot by slot and need no entry. Beam
    search may reorder the cache under it: the beams of a sample share their prompt, and so their slots. ``views`` are
    what layers see of these slots that read another's keys and values, by the layer: some of them are not valid there.
    """

    position: Int[Tensor, "batch slot"]
    valid: Bool[Tensor, "batch slot"]
    all_valid: bool
    logical_length: int  # positions that the unpruned cache would hold
    views: dict[int, Slots] = field(default_factory=dict)
    _masks: dict[int, tuple[Callable[[], Tensor | None], Tensor | None]] = field(default_factory=dict)
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
        return replace(self, _masks={}, _padded={})  # its tensors never change

    def __reduce__(self) -> tuple[Any, ...]:
        return Slots, (self.position, self.valid, self.all_valid, self.logical_length, self.views)

    def rows(self, index: Tensor) -> Slots:
        """The same slots for other batch rows."""
        views = {layer_idx: view.rows(index) for layer_idx, view in self.views.items()}
        return Slots(self.position[index], self.valid[index], self.all_valid, self.logical_length, views)

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

    def narrow(self, layer: CacheLayer, mask: Tensor | None, n_query: int, n_written: int, text: Any) -> Tensor | None:
        """The mask of the whole text for the slots of ``layer``: made once a step for layers that share both.

        ``n_written`` of the ``n_query`` new tokens are in the layer already. ``text`` is the text decoder's config.
        """
        if mask is None and self.all_valid:
            return None
        if torch.compiler.is_compiling() or mask is None:
            return self._narrowed(layer, mask, n_query, n_written, text)
        known, narrow = self._masks.get(id(mask), (None, None))
        if known is None or known() is not mask:
            narrow = self._narrowed(layer, mask, n_query, n_written, text)
            alive = {
                key: entry for key, entry in self._masks.items() if entry[0]() is not None
            }  # none of earlier steps
            self._masks = {**alive, id(mask): (weakref.ref(mask), narrow)}
        return narrow

    def _narrowed(
        self, layer: CacheLayer, mask: Tensor | None, n_query: int, n_written: int, text: Any
    ) -> Tensor | None:
        if (n_slots := capacity(layer)) is not None:
            assert mask is not None, "a static cache always comes with a mask"
            return select_mask(mask, None, *self.padded(n_slots))
        n_new = physical_length(layer) - n_written - self.length
        position, valid = self.followed_by(n_new, n_query)
        end = self.logical_length + n_new + n_query
        if layer.is_sliding:
            before = position.shape[1] - n_query if n_written else layer.keys.shape[-2]
            stored = min(before, layer.sliding_window - 1) + n_query
            position, valid = position[:, -stored:], valid[:, -stored:]
        if mask is not None and mask.dim() == 4:
            return select_mask(mask, None, position - (end - mask.shape[-1]), valid)
        if self.all_valid:
            return None
        if is_flash(text) or mask is not None:
            return valid
        return causal_mask(n_query, valid)


def is_flash(text: Any) -> bool:
    """Whether the kernel that a text decoder's config names takes 2-D padding masks."""
    return "flash" in (text._attn_implementation or "")


def follow(layer_idx: int, source: int, hidden: Tensor, kwargs: dict[str, Any], text: Any) -> dict[str, Any]:
    """A decoder layer's keyword arguments while decoding, for the slots that its cache has.

    ``source`` is the layer whose keys and values it reads; ``text`` is the text decoder's config.
    """
    layer = layer_of(kwargs.get("past_key_values"), source)
    slots = slots_of(layer)
    if slots is None:
        return kwargs
    mask, n_query = kwargs.get("attention_mask"), hidden.shape[-2]
    if source != layer_idx:
        narrow = slots.views.get(layer_idx, slots).narrow(layer, mask, n_query, n_query, text)
        return kwargs if narrow is mask else {**kwargs, "attention_mask": narrow}
    expect(layer)
    narrow, position = slots.narrow(layer, mask, n_query, 0, text), kwargs.get("cache_position")
    if position is not None and (narrow is not mask or capacity(layer) is not None):
        kwargs = {**kwargs, "cache_position": position - slots.dropped}  # until transformers 5.4, where to write
    return kwargs if narrow is mask else {**kwargs, "attention_mask": narrow}


def layer_of(past_key_values: Any, layer_idx: int) -> CacheLayer | None:
    """The cache's layer, or None where there is no cache or it has not grown that far.

    Raises:
        ValueError: no cache of transformers' kind, as recurrent families had in its first versions.
    """
    if past_key_values is not None and not isinstance(past_key_values, Cache):
        raise ValueError(
            f"vlmflow: a KV cache of {type(past_key_values).__name__} cannot hold a pruned prompt; take a newer "
            "transformers, or use_cache=False"
        )
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
        check_kind(layer)
        if slots_of(layer) is None:
            layer.__class__ = _pruned_class(type(layer))
        layer.vlmflow_slots = slots


def check_kind(layer: CacheLayer) -> None:
    """Refuse a cache layer of a class that might count its slots in a way of its own.

    Raises:
        ValueError: with the class.
    """
    known = [getattr(cache_utils, name) for name in _KNOWN if hasattr(cache_utils, name)]
    if slots_of(layer) is None and type(layer) not in known:
        hint = " with sliding-window layers" if isinstance(layer, cache_utils.StaticSlidingWindowLayer) else ""
        raise ValueError(
            f"vlmflow: a KV cache{hint} of {type(layer).__name__} cannot hold a pruned prompt; use the dynamic cache"
        )


def expect(layer: CacheLayer) -> None:
    """Note that what a pruned layer is about to be given was made for its slots."""
    layer.vlmflow_expects = True


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
        vlmflow_expects = False  # whether a session has told the decoder layer of the missing tokens
        _physical = False

        def update(self, *args: Any, **kwargs: Any) -> Any:
            if not self.vlmflow_expects:
                raise RuntimeError(
                    "vlmflow: this KV cache holds a pruned prompt, and no session that prunes its layers is attached "
                    "to the model now; go on inside the session that pruned it, or in one whose pruner begins no later"
                )
            self.vlmflow_expects = False
            return super().update(*args, **kwargs)

        def __reduce__(self) -> tuple[Any, ...]:
            return _restored, (cls, vars(self))

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


def _restored(cls: Any, state: dict[str, Any]) -> Any:
    """A pruned layer that was copied or saved."""
    pruned = _pruned_class(cls)
    layer = pruned.__new__(pruned)
    vars(layer).update(state)
    return layer
