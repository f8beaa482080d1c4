"""Attach to a model: the hooks, and whom each of them calls."""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmflow.engine.cache import follow, layer_of
from vlmflow.engine.calls import Calls
from vlmflow.engine.prefill import Prefill
from vlmflow.engine.probe import unwatch, unwatch_everywhere, watch
from vlmflow.engine.prompt import Inputs
from vlmflow.engine.ranking import Look
from vlmflow.engine.tap import Tap, decode_positions, tapped
from vlmflow.engine.target import Target
from vlmflow.engine.trace import Trace
from vlmflow.pruners import Pruner, Unpruned

_CHECKPOINTS_HOOKS = "__call__" in vars(GradientCheckpointingLayer)  # until transformers 5.23

_attached: weakref.WeakKeyDictionary[nn.Module, Callable[[], Session | None]] = weakref.WeakKeyDictionary()
_attaching = threading.Lock()


def attach(model: nn.Module, pruner: Pruner = Unpruned(), taps: Sequence[Tap] = ()) -> Session:  # noqa: B008 (frozen)
    """Attach a pruner to a Hugging Face model until ``detach()``, or for a ``with`` block that gives its ``Trace``.

    The model stays as it is: generation, KV cache, padded batches, beams, training work as before, on fewer image
    tokens. Without a pruner only the trace is kept. Prefill is pruned once; with ``use_cache=False`` generation
    re-reads its whole text each step, and ranks anew each time. ``taps`` take part in the attention of their layers.

    >>> session = attach(model, FastV(k=2, ratio=0.75))
    >>> output = model.generate(**inputs, max_new_tokens=4)
    >>> session.trace.image_tokens[0], session.trace.image_tokens[2]
    ((576,), (144,))
    >>> session.detach()

    Raises:
        TypeError: not a transformers image-text-to-text model that the engine can serve.
        ValueError: a state or a pruner that does not fit, or a model that already has a session.
    """
    return Session(model, pruner, taps)


def prune(model: nn.Module, pruner: Pruner) -> Session:
    """``attach`` with a pruner, for a ``with`` block that gives its ``Trace``.

    >>> with prune(model, HiMAP()) as trace:
    ...     output = model.generate(**inputs, max_new_tokens=4)
    >>> trace.image_tokens[8]  # of the one sample
    (72,)
    """
    return Session(model, pruner, ())


def detach(model: nn.Module) -> None:
    """Take away whatever session is attached to a model, held by anyone or not; nothing where there is none."""
    for module in model.modules():
        session = _attached.get(module, lambda: None)()
        if session is not None:
            session.detach()


class Session:
    """The hooks of one attachment. A context manager that gives the ``Trace``; or call ``detach()``."""

    def __init__(self, model: nn.Module, pruner: Pruner, taps: Sequence[Tap]):
        self._target = target = Target.find(model)
        n_layers = len(target.layers)
        for layer_idx in sorted({layer_idx for tap in taps for layer_idx in tap.layers}):
            if not 0 <= layer_idx < n_layers:
                raise ValueError(
                    f"vlmflow: a tap wants layer {layer_idx}, but this model has layers 0 to {n_layers - 1}"
                )
            if not target.attends[layer_idx]:
                raise ValueError(f"vlmflow: a tap wants layer {layer_idx}, which is recurrent and has no attention")
            if pruner.stages(n_layers, 0) and target.sources[layer_idx] != layer_idx:
                raise ValueError(
                    f"vlmflow: a tap wants layer {layer_idx}, whose keys are another's and hold dropped tokens"
                )
        self._pruner = pruner
        self._taps = tuple(taps)
        self._stage_layers = [stage.layer for stage in pruner.checked_stages(n_layers, 0)]
        self._looks = Look.all(pruner, target)
        self._read_layers = {look.layer for look in self._looks.values() if not look.is_ahead}
        self._watched_layers = self._read_layers.union(*(tap.layers for tap in taps))
        self.trace = Trace(target.core.config, pruner, n_layers)
        self._calls = Calls()
        self._embedded = threading.local()
        self._is_unsure = False  # whether a prompt came as embeddings, and no image was found in it
        self._handles: list[Any] = []
        with _attaching:
            if target.text in _attached:
                raise ValueError(
                    f"vlmflow: {type(target.core).__name__} already has a session; leave it, or call "
                    "vlmflow.detach(model) first"
                )
            _attached[target.text] = weakref.ref(self)
        self._install()

    def __enter__(self) -> Trace:
        return self.trace

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.detach()
        if kind is None and self._stage_layers and self._is_unsure and not self.trace.has_image:
            warnings.warn(
                f"vlmflow: this session of {self._pruner} ends without having pruned anything: it was given embeddings "
                "in which no image could be found. Pass input_ids, or make the embeddings with the model's own table "
                "inside the session",
                stacklevel=2,
            )

    def detach(self) -> None:
        """Take every hook away; the trace stays readable. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()
        for layer_idx in self._watched_layers:
            unwatch_everywhere(self._target.attention(layer_idx))
        _attached.pop(self._target.text, None)

    def _install(self) -> None:
        target, keep = self._target, self._handles.append
        for model in target.outer:
            keep(model.register_forward_pre_hook(_Hook(self._enter_model), with_kwargs=True))
            keep(model.register_forward_hook(_Hook(self._leave_model), always_call=True))
        keep(target.embedding.register_forward_pre_hook(_Hook(self._note_embedded)))
        keep(target.text.register_forward_pre_hook(_Hook(self._enter_text), with_kwargs=True))
        keep(target.text.register_forward_hook(_Hook(self._leave_text), always_call=True))
        for layer_idx in range(self._first_hooked(), len(target.layers)):
            hook = _Hook(self._before_layer(layer_idx))
            keep(target.layers[layer_idx].register_forward_pre_hook(hook, with_kwargs=True))
        for tap in self._taps:
            for layer_idx in tap.layers:
                hook = _Hook(self._before_tapped_layer(layer_idx, tap))
                keep(target.layers[layer_idx].register_forward_pre_hook(hook, with_kwargs=True))
        if self._stage_layers:
            keep(target.layers[-1].register_forward_hook(_Hook(self._after_last_layer)))

    def _first_hooked(self) -> int:
        """The first layer that is told anything: one that drops or ranks, or whose keys later layers read."""
        sources, n_layers = self._target.sources, len(self._target.layers)
        read = [source for layer_idx, source in enumerate(sources) if source != layer_idx and self._stage_layers]
        return min([*self._stage_layers, *self._read_layers, *read, n_layers])

    # the models around the text decoder

    def _note_embedded(self, module: Any, args: tuple[Any, ...]) -> None:
        if args and args[0].dim() == 2 and args[0].shape[1] > 1:
            self._embedded.ids = args[0]

    def _enter_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if ids is None else ids
        if given is None or (given.shape[1] == 1 and not self._calls):
            return  # one token at a time: decoding, where there is nothing to look at
        if self._calls and self._calls.forget_interrupted():
            self._unwatch()
        around = self._calls.innermost()
        if around is not None and around.inputs is not None and around.model is not module:
            return  # a model inside the one that was called
        embedded = getattr(self._embedded, "ids", None)
        inputs = None if given.shape[1] == 1 else Inputs.read(self._target, ids, embedded, kwargs)
        self._calls.begin(module, inputs)

    def _leave_model(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        call = self._calls.end(module)
        if output is None or call is None or call.inputs is None or not (self._stage_layers or self._taps):
            return
        if bool(call.inputs.image.any()):
            raise RuntimeError(
                f"vlmflow: {type(module).__name__} was called with image tokens, but its text decoder, "
                f"{type(self._target.text).__name__}, never got them by a call that hooks see; attach to the model as "
                "it is called, not compiled and not copied"
            )

    # the text decoder

    def _enter_text(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, embeds = self._calls.innermost(), kwargs.get("inputs_embeds")
        if embeds is None:  # some text decoders embed images themselves
            embeds = args[0] if args else kwargs.get("input_ids")
        if call is None or call.inputs is None or embeds is None:
            return None
        inputs, call.inputs = call.inputs, None
        if inputs.image.shape != embeds.shape[:2]:
            raise RuntimeError(
                f"vlmflow: {type(module).__name__} got a sequence of shape {tuple(embeds.shape[:2])} for token ids of "
                f"shape {tuple(inputs.image.shape)}; a model that changes the length of its prompt cannot be pruned"
            )
        past_key_values = kwargs.get("past_key_values")
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        prompt = inputs.prompt(embeds, kwargs.get("attention_mask"), past)
        prefill = Prefill.open(self._pruner, self._target, self._looks, prompt)
        if past and not any(prefill.selection.image_tokens):
            return None  # more text, in chat or to be verified: part of decoding
        if past and self._taps:
            raise ValueError("vlmflow: taps follow one prompt and its answer; read further images with an empty cache")
        if prefill.drops:
            self._refuse_checkpointing()
        call.prefill = prefill
        return args, prefill.enter_text(kwargs)

    def _refuse_checkpointing(self) -> None:
        text = self._target.text
        if _CHECKPOINTS_HOOKS and text.training and text.is_gradient_checkpointing:
            raise ValueError(
                "vlmflow: pruning while training with gradient checkpointing needs transformers 5.23 or newer, where "
                "hooks do not run again in the backward pass; upgrade, or turn checkpointing off"
            )

    def _leave_text(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        call = self._calls.innermost()
        prefill = None if call is None else call.prefill
        if call is not None:
            call.prefill = None
        if output is None:  # an exception, perhaps between watching a layer and its call
            self._unwatch()
        elif prefill is not None:
            self.trace.take(prefill.close())
            self._is_unsure |= prefill.prompt.ids is None

    def _unwatch(self) -> None:
        for layer_idx in self._watched_layers:
            unwatch(self._target.attention(layer_idx))

    # the decoder layers

    def _before_layer(self, layer_idx: int) -> Callable[..., Any]:
        target, is_read = self._target, layer_idx < min(self._stage_layers) and layer_idx in self._read_layers
        names = _parameters(type(target.layers[layer_idx]))
        source, config = target.sources[layer_idx], target.text.config

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            prefill = self._calls.prefill()
            if prefill is not None and prefill.drops:
                named = dict(zip(names, args, strict=False)) | kwargs  # one form for all: the layer's input, then names
                hidden, kwargs = prefill.enter(layer_idx, module, named.pop(names[0]), named)
                return (hidden,), kwargs
            return None if is_read else (args, follow(layer_idx, source, _hidden(args, kwargs), kwargs, config))

        return hook

    def _before_tapped_layer(self, layer_idx: int, tap: Tap) -> Callable[..., None]:
        source = self._target.sources[layer_idx]

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            prefill, n_query = self._calls.prefill(), _hidden(args, kwargs).shape[-2]
            if prefill is not None:
                layout, positions = prefill.prompt.layout, prefill.positions(layer_idx)
            else:
                layer = layer_of(kwargs.get("past_key_values"), source)
                assert layer is not None, "without a cache, every pass is a prefill"
                layout, positions = self.trace.layout, decode_positions(layer, n_query, source != layer_idx)
            watch(module.self_attn, tapped(tap, layer_idx, layout, positions, n_query))

        return hook

    def _after_last_layer(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        prefill = self._calls.prefill()
        if prefill is None:
            return None
        if isinstance(output, tuple):  # in transformers 5.0
            return prefill.leave(output[0]), *output[1:]
        return prefill.leave(output)


class _Hook:
    """A hook that stays behind where its model is copied or saved: the copy is not attached."""

    def __init__(self, run: Callable[..., Any]):
        self._run = run

    def __call__(self, *call: Any) -> Any:
        return self._run(*call)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_do_nothing,)


def _do_nothing(*call: Any) -> None:
    """The hook of a copy."""


@cache
def _parameters(layer: type[nn.Module]) -> tuple[str, ...]:
    """The names of what a decoder layer's forward takes, in order."""
    return tuple(inspect.signature(layer.forward).parameters)[1:]


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A decoder layer's input, its first parameter."""
    return args[0] if args else kwargs["hidden_states"]
