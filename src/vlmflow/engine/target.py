"""What a session attaches to: the text decoder inside a model, its image token ids, and what cannot be served."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from vlmflow.core.families import IMAGE_TOKEN_IDS, Family, family_of
from vlmflow.engine.cache import is_flash

_ATTENDING = {"full_attention", "sliding_attention", "chunked_attention", "indexed_attention"}  # kinds of layers
RECURRENT = {"linear_attention", "conv"}


@dataclass(frozen=True)
class Target:
    """The parts of a model that the engine hooks."""

    core: PreTrainedModel  # the transformers model, without wrappers
    text: PreTrainedModel  # its text decoder
    outer: tuple[PreTrainedModel, ...]  # the models around the text decoder, which are called with the token ids
    image_token_ids: tuple[int, ...]
    family: Family

    @cached_property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        layers = self.text.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    @cached_property
    def attends(self) -> tuple[bool, ...]:
        """Of each layer, whether it attends; others are recurrent: linear attention or short convolutions."""
        return tuple(hasattr(layer, "self_attn") for layer in self.layers)

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """Of each layer, the one whose keys and values it reads: itself, or an earlier one (Gemma 3n and 4)."""
        config, n_layers = self.text.config, len(self.layers)
        n_own = n_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
        kinds = getattr(config, "layer_types", None) or ()
        shared = (max(i for i in range(n_own) if kinds[i] == kinds[layer]) for layer in range(n_own, n_layers))
        return *range(n_own), *shared

    @property
    def embedding(self) -> nn.Module:
        """The table that makes states of token ids."""
        table = self.text.embed_tokens
        assert isinstance(table, nn.Module)
        return table

    def attention(self, layer_idx: int) -> Any:
        """The attention module of a layer that has one."""
        return self.layers[layer_idx].self_attn

    def refuse_length(self, length: int) -> None:
        """Refuse a prompt whose length makes layers count positions in what they are given.

        Raises:
            ValueError: Llama 4 scales queries without rotary positions by their place, from ``floor_scale`` tokens on,
                and so does Ministral 3 in early versions of transformers, where its layers get slots for positions.
        """
        config, first, remedy = self.text.config, math.inf, ""
        if getattr(config, "attn_temperature_tuning", False):
            first, remedy = config.floor_scale, "set attn_temperature_tuning to False"
        elif _scaling(config) and "cache_position" in inspect.signature(self.attention(0).forward).parameters:
            first, remedy = config.rope_parameters["original_max_position_embeddings"], "take a newer transformers"
        if length >= first:
            raise ValueError(
                f"vlmflow: {type(self.core).__name__} counts positions in what is left from {first} tokens on, and "
                f"this prompt has {length}; prune shorter ones, or {remedy}"
            )

    @property
    def is_flash(self) -> bool:
        """Whether the text decoder's kernel takes 2-D padding masks."""
        return is_flash(self.text.config)

    @classmethod
    def find(cls, model: nn.Module) -> Target:
        """Find the text decoder of a transformers image-text-to-text model, wrapped (PEFT) or not.

        Raises:
            TypeError: no transformers model, or one that holds no single text decoder fed with image tokens.
            ValueError: a model whose state would make pruning silently wrong; the message names the remedy.
        """
        core = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        if core is None:
            raise TypeError(f"vlmflow: wanted a Hugging Face transformers model, got {type(model).__name__}")
        name = type(core).__name__
        image_token_ids = _image_token_ids(name, core.config)
        _refuse_state(model, core)
        paths = {path: module for path, module in core.named_modules() if _is_decoder(module, core.config)}
        if len(paths) != 1:
            raise TypeError(f"vlmflow: {name} is not supported: wanted one text decoder in it, found {len(paths)}")
        path, text = next(iter(paths.items()))
        _refuse_architecture(name, text)
        parts = path.split(".")
        around = [core.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
        outer = tuple(module for module in around if isinstance(module, PreTrainedModel))
        return cls(core, text, outer, image_token_ids, family_of(core.config))


def _image_token_ids(name: str, config: PreTrainedConfig) -> tuple[int, ...]:
    """The ids that a config holds, or else the first config in it that has some."""
    unset = None
    for part in (config, *(getattr(config, sub) for sub in config.sub_configs)):
        values = {field: getattr(part, field) for field in IMAGE_TOKEN_IDS if hasattr(part, field)}
        if ids := {value for value in values.values() if isinstance(value, int)}:
            return tuple(sorted(ids))
        unset = unset or next(iter(values), None)
    if unset is not None:
        raise TypeError(
            f"vlmflow: {name} cannot be pruned as it is: its config leaves {unset} unset, by which image tokens are "
            f"known; set model.config.{unset} to the id that stands for an image in its tokenizer"
        )
    raise TypeError(
        f"vlmflow: {name} has no image token id in its config ({', '.join(IMAGE_TOKEN_IDS)}): it is no "
        "image-text-to-text model, or its images do not stand in the sequence of tokens"
    )


def _is_decoder(module: Any, config: PreTrainedConfig) -> bool:
    return (
        isinstance(module, PreTrainedModel)
        and hasattr(module, "embed_tokens")
        and isinstance(layers := module._modules.get("layers"), nn.ModuleList)
        and hasattr(text := config.get_text_config(decoder=True), "num_hidden_layers")
        and len(layers) == text.num_hidden_layers
    )


def _refuse_state(model: nn.Module, core: PreTrainedModel) -> None:
    name = type(core).__name__
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            f"vlmflow: {name} is wrapped in nn.DataParallel; attach to the model inside, one process a GPU"
        )
    if hasattr(model, "_orig_mod") or any(map(_is_compiled, model.modules())):
        raise ValueError(
            f"vlmflow: {name} has been compiled, and compiled code does not see hooks attached later; attach to the "
            "uncompiled model (generate() compiles its own decoding afterwards)"
        )
    if core.tp_size is not None and core.tp_size > 1:
        raise ValueError(
            f"vlmflow: {name} is split over {core.tp_size} devices by tensor parallelism, where each would rank by its "
            "own heads and keep other tokens; use device_map instead"
        )


def _scaling(config: Any) -> float | None:
    """By how much queries grow with their positions."""
    return (getattr(config, "rope_parameters", None) or {}).get("llama_4_scaling_beta")


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")


def _refuse_architecture(name: str, text: Any) -> None:
    for reason in _strange_to_us(text):
        raise TypeError(f"vlmflow: {name} is not supported: {reason}")
    if text.config._attn_implementation == "flex_attention":
        raise ValueError(
            f"vlmflow: {name} runs flex_attention, whose block masks cannot be narrowed; load it with "
            'attn_implementation="sdpa"'
        )
    if is_flash(text.config) and _scaling(text.config):
        raise ValueError(
            f"vlmflow: {name} scales queries by their positions, which flash attention would take for packed texts "
            'where tokens are missing; load it with attn_implementation="sdpa"'
        )


def _strange_to_us(text: Any) -> Iterator[str]:
    """What a text decoder has that the engine does not know, in words."""
    kinds = set(getattr(text.config, "layer_types", None) or ())
    if unknown := kinds - _ATTENDING - RECURRENT:
        yield f"its layers of the kind {', '.join(sorted(unknown))} cannot be told that tokens are missing"
    if any(hasattr(layer, "cross_attn") for layer in text.layers):
        yield "its images do not stand in the sequence of tokens: they come in by cross-attention"
    if not any(hasattr(layer, "self_attn") for layer in text.layers):
        yield "none of its layers has self-attention to rank or mask by"
    for kind, layer in zip(getattr(text.config, "layer_types", None) or (), text.layers, strict=False):
        if hasattr(layer, "self_attn") != (kind in _ATTENDING):
            yield f"its layers of the kind {kind} are built in a way that is not known"
    for field in ("hc_mult", "hc_count"):
        if hasattr(text.config, field):
            yield f"its hidden states are several streams ({field})"
    parameters = {parameter for layer in text.layers for parameter in inspect.signature(type(layer).forward).parameters}
    for parameter in sorted(parameters & {"conv_mask", "block_states"}):
        yield f"its layers count positions in what they are given ({parameter}), and would count wrongly"
