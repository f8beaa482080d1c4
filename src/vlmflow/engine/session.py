"""Attach to a model: hooks that open a prefill, drop image tokens on the way down, and narrow masks while decoding."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmflow.core.layout import Layout
from vlmflow.engine.cache import capacity, layer_of, slots_of
from vlmflow.engine.prefill import Prefill
from vlmflow.engine.probe import KernelCall, unwatch, watch
from vlmflow.engine.tap import Tap, decode_positions, prefill_positions, tapped
from vlmflow.engine.target import Target
from vlmflow.engine.trace import Trace
from vlmflow.pruners import Pruner, Unpruned

_CHECKPOINTS_HOOKS = "__call__" in vars(GradientCheckpointingLayer)  # until transformers 5.23
_PACKED = (
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)  # packing cannot be pruned batch by batch

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_attaching = threading.Lock()


def attach(model: nn.Module, pruner: Pruner = Unpruned(), taps: Sequence[Tap] = ()) -> Session:  # noqa: B008 (frozen)
    """Attach a pruner to a Hugging Face model until ``detach()``, or for a ``with`` block that gives its ``Trace``.

    The model stays as it is: generation, KV cache, padded batches, beams, training work as before, on fewer image
    tokens. Without a pruner only the trace is kept. Prefill is pruned once; with ``use_cache=False`` generation
    re-reads its whole text each step, and ranks anew each time. ``taps`` take part in the attention of their layers.

    Raises:
        TypeError: not a transformers image-text-to-text model that the engine can serve.
        ValueError: a state or a pruner that does not fit, or a model that already has a session.
    """
    return Session(model, pruner, taps)


def prune(model: nn.Module, pruner: Pruner) -> Session:
    """``attach`` with a pruner: ``with prune(model, HiMAP()) as trace: model.generate(**inputs)``."""
    return Session(model, pruner, ())


@dataclass(frozen=True)
class _Call:
    """What the model around the text decoder was called with."""

    image: Bool[Tensor, "batch length"]
    follows_prompt: Bool[Tensor, "batch length"]
    mask: Any  # of any form that a model takes


class _PerThread(dict[int, Any]):
    """A value for each thread that has one. Empty it answers without asking for the thread, so that it compiles."""

    def mine(self) -> Any:
        return self.get(get_ident()) if self else None

    def take(self) -> Any:
        return self.pop(get_ident(), None) if self else None

    def put(self, value: Any) -> None:
        self[get_ident()] = value


class _Peeked(Exception):  # noqa: N818 (no error: it ends a call early)
    """Raised once a layer's q and k have been seen."""


def _stop(call: KernelCall) -> tuple[Tensor, Any]:
    raise _Peeked


class Session:
    """The hooks of one attachment. A context manager that gives the ``Trace``; or call ``detach()``."""

    def __init__(self, model: nn.Module, pruner: Pruner, taps: Sequence[Tap]):
        self._target = target = Target.find(model)
        n_layers = len(target.layers)
        stages = pruner.checked_stages(n_layers, 0)
        for layer_idx in sorted({layer_idx for tap in taps for layer_idx in tap.layers}):
            if not 0 <= layer_idx < n_layers:
                raise ValueError(
                    f"vlmflow: a tap wants layer {layer_idx}, but this model has layers 0 to {n_layers - 1}"
                )
        self._pruner = pruner
        self._taps = tuple(taps)
        self._stage_layers = [stage.layer for stage in stages]
        self._scored = {stage.scored_layer for stage in stages if stage.queries is not None and not stage.peek}
        self._watched = self._scored.union(*(tap.layers for tap in taps))
        self.trace = Trace(target.core.config, pruner, n_layers)
        self._calls = _PerThread()  # of _Call
        self._prefills = _PerThread()  # of Prefill
        self._handles: list[Any] = []
        with _attaching:
            if target.text in _attached:
                raise ValueError(
                    f"vlmflow: {type(target.core).__name__} already has a session; leave it (or call detach()) first"
                )
            _attached.add(target.text)
        self._install()

    def __enter__(self) -> Trace:
        return self.trace

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Take every hook away; the trace stays readable. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _attached.discard(self._target.text)

    def _install(self) -> None:
        target, keep = self._target, self._handles.append
        for model in target.outer:
            keep(model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
            keep(model.register_forward_hook(self._leave_model, always_call=True))
        keep(target.text.register_forward_pre_hook(self._enter_text, with_kwargs=True))
        keep(target.text.register_forward_hook(self._leave_text, always_call=True))
        first = min([*self._stage_layers, *self._scored, len(target.layers)])
        for layer_idx in range(first, len(target.layers)):
            hook = self._before_layer(layer_idx)
            keep(target.layers[layer_idx].register_forward_pre_hook(hook, with_kwargs=True))
        for tap in self._taps:
            for layer_idx in tap.layers:
                hook = self._before_tapped_layer(layer_idx, tap)
                keep(target.layers[layer_idx].register_forward_pre_hook(hook, with_kwargs=True))
        if self._stage_layers:
            keep(target.layers[-1].register_forward_hook(self._after_last_layer))

    # the models around the text decoder: the only ones that see token ids

    def _enter_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, embeds = args[0] if args else kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        given = ids if ids is not None else embeds
        if given is None or given.shape[1] == 1 or self._calls.mine() is not None:
            return  # one token at a time: decoding, where there is nothing to look at
        if ids is not None:
            image = Layout.read(ids, self._target.image_token_ids).image
        else:
            image = self._embedded_images(given)
        self._calls.put(_Call(image, _follows_prompt(image, kwargs), kwargs.get("attention_mask")))

    def _embedded_images(self, embeds: Tensor) -> Bool[Tensor, "batch length"]:
        table = self._target.core.get_input_embeddings()
        image = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        for token_id in self._target.image_token_ids:
            image |= (embeds == table(torch.full((), token_id, device=embeds.device))).all(-1)
        return image

    def _leave_model(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self._calls.take()

    # the text decoder

    def _enter_text(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._calls.take()
        embeds = kwargs.get("inputs_embeds")
        if call is None or embeds is None:
            return None
        batch, length = embeds.shape[:2]
        if call.image.shape != (batch, length):
            raise RuntimeError(
                f"vlmflow: {type(module).__name__} got a sequence of shape {(batch, length)} for token ids of shape "
                f"{tuple(call.image.shape)}; a model that changes the length of its prompt cannot be pruned"
            )
        past_key_values = kwargs.get("past_key_values")
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        mask = kwargs.get("attention_mask") if call.mask is None else call.mask
        padding = _padding(mask, batch, length, past, embeds.device)
        layout = Layout(call.image.to(embeds.device) & ~padding, padding)
        prompt = ~padding & ~call.follows_prompt.to(embeds.device)
        prefill = Prefill.open(self._pruner, len(self._target.layers), layout, prompt, past)
        if past and not any(prefill.selection.image_tokens):
            return None  # more text, in chat or to be verified: part of decoding
        if past and self._taps:
            raise ValueError("vlmflow: taps follow one prompt and its answer; read further images with an empty cache")
        if prefill.stages:
            self._refuse_checkpointing()
        self._prefills.put(prefill)
        return self._take_over_deepstack(prefill, args, kwargs)

    def _refuse_checkpointing(self) -> None:
        text = self._target.text
        if _CHECKPOINTS_HOOKS and text.training and text.is_gradient_checkpointing:
            raise ValueError(
                "vlmflow: pruning while training with gradient checkpointing needs transformers 5.23 or newer, where "
                "hooks do not run again in the backward pass; upgrade, or turn checkpointing off"
            )

    def _take_over_deepstack(self, prefill: Prefill, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leave the model the features of layers that still see the whole prompt, and add the later ones here."""
        features = kwargs.get("deepstack_visual_embeds")
        if features is None or not prefill.stages or len(features) <= min(prefill.stages):
            return None
        first = min(prefill.stages)
        where = kwargs["visual_pos_masks"]
        prefill.deepstack_row = (where.flatten().cumsum(0) - 1).view(where.shape)
        prefill.deepstack = {layer_idx + 1: features[layer_idx] for layer_idx in range(first, len(features))}
        return args, {**kwargs, "deepstack_visual_embeds": features[:first]}

    def _leave_text(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        prefill = self._prefills.take()
        if output is None:  # an exception, perhaps between watching a layer and its call
            for layer_idx in self._watched:
                unwatch(self._target.attention(layer_idx))
        elif prefill is not None:
            prefill.close()
            self.trace.take(prefill)

    # the decoder layers

    def _before_layer(self, layer_idx: int) -> Callable[..., Any]:
        is_pruned = layer_idx >= self._stage_layers[0]

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            prefill = self._prefills.mine()
            if prefill is not None and prefill.stages:
                return self._prefill_layer(prefill, layer_idx, module, args, kwargs)
            if is_pruned:
                return self._decode_layer(layer_idx, args, kwargs)
            return None

        return hook

    def _before_tapped_layer(self, layer_idx: int, tap: Tap) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            prefill, layer = self._prefills.mine(), layer_of(kwargs.get("past_key_values"), layer_idx)
            hidden = args[0] if args else kwargs["hidden_states"]
            if prefill is not None:
                layout, positions = prefill.layout, prefill_positions(prefill, layer)
            else:
                assert layer is not None, "without a cache, every pass is a prefill"
                layout, positions = self.trace.layout, decode_positions(layer, hidden)
            watch(module.self_attn, tapped(tap, layer_idx, layout, positions, hidden.shape[1]))

        return hook

    def _decode_layer(self, layer_idx: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = layer_of(kwargs.get("past_key_values"), layer_idx)
        slots = slots_of(layer)
        if layer is None or slots is None:
            return None
        mask = kwargs.get("attention_mask")
        n_query = (args[0] if args else kwargs["hidden_states"]).shape[1]
        narrow = slots.decode_mask(layer, mask, n_query, self._target.is_flash)
        position = kwargs.get("cache_position")  # until transformers 5.4, where a static cache writes
        if narrow is mask and (position is None or capacity(layer) is None):
            return None
        changed = {**kwargs, "attention_mask": narrow}
        if position is not None:
            changed["cache_position"] = position - slots.dropped
        return args, changed

    def _prefill_layer(
        self,
        prefill: Prefill,
        layer_idx: int,
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if not args:  # one form for all: the first parameter of every decoder layer is its input
            args, kwargs = (
                (kwargs["hidden_states"],),
                {k: v for k, v in kwargs.items() if k != "hidden_states"},
            )
        hidden, *rest = args
        prefill.cache = kwargs.get("past_key_values")
        hidden = prefill.add_deepstack(layer_idx, hidden)
        if layer_idx in prefill.stages:
            stage = prefill.stages[layer_idx][0]
            if stage.peek and stage.queries is not None:
                self._peek(prefill, layer_idx, module, hidden, rest, self._narrow(prefill, layer_idx, hidden, kwargs))
            hidden = prefill.apply(layer_idx, hidden)
        if layer_idx in self._scored:
            stage = prefill.stages[layer_idx + 1][0]
            watch(module.self_attn, prefill.watcher(stage, layer_of(prefill.cache, layer_idx)))
        kwargs = self._narrow(prefill, layer_idx, hidden, kwargs)
        if prefill.is_pruned and prefill.cache is not None:
            prefill.held[layer_idx] = prefill.slots(layer_of(prefill.cache, layer_idx))
        return (hidden, *rest), kwargs

    def _narrow(self, prefill: Prefill, layer_idx: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The layer's keyword arguments for the positions that are left."""
        if not prefill.is_pruned:
            return kwargs
        layer = layer_of(prefill.cache, layer_idx)
        self._refuse_window(layer)
        kwargs = {
            **kwargs,
            "attention_mask": prefill.mask(kwargs["attention_mask"], layer, self._target.is_flash),
        }
        tables, ids = kwargs.get("position_embeddings"), kwargs.get("position_ids")
        if tables is not None:  # rotated already: ids with gaps would only make flash attention see packed samples
            kwargs |= {"position_embeddings": tuple(map(prefill.shorten, tables)), "position_ids": None}
        elif ids is not None:
            kwargs["position_ids"] = prefill.shorten_ids(ids)
        if kwargs.get("cache_position") is not None:
            end = prefill.slots(layer).length
            kwargs["cache_position"] = torch.arange(end - hidden.shape[1], end, device=hidden.device)
        return kwargs | {name: None for name in _PACKED if kwargs.get(name) is not None}

    def _refuse_window(self, layer: Any) -> None:
        if isinstance(layer, StaticSlidingWindowLayer):
            raise ValueError(
                "vlmflow: a static cache with sliding-window layers cannot hold a pruned prompt; use the dynamic cache"
            )
        if self._target.is_flash and layer is not None and layer.is_sliding:
            raise ValueError(
                "vlmflow: flash attention counts a sliding window in slots, which pruning widens; load the model with "
                'attn_implementation="sdpa"'
            )

    def _peek(
        self,
        prefill: Prefill,
        layer_idx: int,
        module: Any,
        hidden: Tensor,
        rest: list[Any],
        kwargs: dict[str, Any],
    ) -> None:
        """Run a layer ahead as far as its q and k, on a copy of its cache."""
        shadow = _shadow(prefill.cache, layer_idx) if prefill.past else None
        watch(module.self_attn, _stop)
        watch(module.self_attn, prefill.watcher(prefill.stages[layer_idx][0], layer_of(shadow, layer_idx)))
        try:
            with torch.no_grad():
                module.forward(hidden, *rest, **{**kwargs, "past_key_values": shadow})
        except _Peeked:
            pass
        finally:
            unwatch(module.self_attn)

    def _after_last_layer(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        prefill = self._prefills.mine()
        if prefill is None or not prefill.is_pruned:
            return None
        hidden, *rest = output if isinstance(output, tuple) else (output,)  # a tuple in transformers 5.0
        hidden = prefill.restore_length(prefill.add_deepstack(len(self._target.layers), hidden))
        return (hidden, *rest) if isinstance(output, tuple) else hidden


def _follows_prompt(image: Tensor, kwargs: dict[str, Any]) -> Bool[Tensor, "batch length"]:
    """Which tokens are no prompt: a teacher-forced answer, or the drafts of assisted decoding's first pass.

    Assisted decoding hands over an empty cache, and asks for the logits of the drafts and of the token before them.
    In transformers 5.0 generation hands over no cache at first; what tells it from a plain call are cache positions.
    """
    follows = torch.zeros_like(image)
    labels, cache, kept = kwargs.get("labels"), kwargs.get("past_key_values"), kwargs.get("logits_to_keep", 0)
    if labels is not None:
        answer = labels.to(image.device) != -100
        asked = (Layout(image, follows).question & ~answer).any(1, keepdim=True)
        follows = answer & asked  # where all text is taught, nothing tells the answer from the question
    generating = kwargs.get("cache_position") is not None if cache is None else int(cache.get_seq_length()) == 0
    if isinstance(kept, int) and kept > 1 and generating:
        follows[:, 1 - kept :] = True
    return follows


def _padding(mask: Any, batch: int, length: int, past: int, device: torch.device) -> Bool[Tensor, "batch length"]:
    """Which of the new positions are padding, from any mask that a model takes."""
    if isinstance(mask, dict):  # by layer type
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.zeros(batch, length, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor):
        raise ValueError(f"vlmflow: cannot read an attention mask of type {type(mask).__name__}")
    if mask.dim() == 2:
        visible = mask[:, -length:].to(device).bool()
    else:
        row = mask[:, 0, -1, past : past + length].to(device)  # the last query sees all but padding
        visible = row if row.dtype == torch.bool else row == 0
    return ~visible.expand(batch, length)


def _shadow(cache: Cache | None, layer_idx: int) -> Cache | None:
    """A cache that may be written to without a trace, as far as one layer is concerned."""
    if cache is None:
        return None
    shadow = copy.copy(cache)
    shadow.layers = list(cache.layers)
    shadow.layers[layer_idx] = copy.deepcopy(cache.layers[layer_idx])
    return shadow
