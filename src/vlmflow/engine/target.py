"""What a session attaches to: the text decoder inside a model, its image token ids, and what cannot be served."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from vlmflow.core.families import Family, family_of


@dataclass(frozen=True)
class Target:
    """The parts of a model that the engine hooks."""

    core: PreTrainedModel  # the transformers model, without wrappers
    text: PreTrainedModel  # its text decoder
    outer: tuple[PreTrainedModel, ...]  # the models around the text decoder, which are called with the token ids
    image_token_ids: tuple[int, ...]
    family: Family

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        layers = self.text.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    def attention(self, layer_idx: int) -> Any:
        """The attention module of a layer."""
        return self.layers[layer_idx].self_attn

    @property
    def is_flash(self) -> bool:
        """Whether the text decoder's kernel takes 2-D padding masks."""
        return "flash" in (self.text.config._attn_implementation or "")

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
        family = family_of(core.config)
        image_token_ids = _image_token_ids(name, core.config, family.token_ids)
        _refuse_state(model, core)
        paths = {path: module for path, module in core.named_modules() if _is_decoder(module, core.config)}
        if len(paths) != 1:
            raise TypeError(f"vlmflow: {name} is not supported: wanted one text decoder in it, found {len(paths)}")
        path, text = next(iter(paths.items()))
        _refuse_architecture(name, text)
        parts = path.split(".")
        around = [core.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
        outer = tuple(module for module in around if isinstance(module, PreTrainedModel))
        return cls(core, text, outer, image_token_ids, family)


def _image_token_ids(name: str, config: PreTrainedConfig, fields: Sequence[str]) -> tuple[int, ...]:
    """The ids under these fields, of the config or else of the first config in it that has some."""
    unset = None
    for part in (config, *(getattr(config, sub) for sub in config.sub_configs)):
        values = {field: getattr(part, field) for field in fields if hasattr(part, field)}
        if ids := {value for value in values.values() if isinstance(value, int)}:
            return tuple(sorted(ids))
        unset = unset or next(iter(values), None)
    if unset is not None:
        raise TypeError(
            f"vlmflow: {name} cannot be pruned as it is: its config leaves {unset} unset, by which image tokens are "
            f"known; set model.config.{unset} to the id that stands for an image in its tokenizer"
        )
    raise TypeError(
        f"vlmflow: {name} has no image token id in its config ({', '.join(fields)}): it is no image-text-to-text "
        "model, or its images do not stand in the sequence of tokens"
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
    if hasattr(model, "_orig_mod") or any(module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError(
            f"vlmflow: {name} has been compiled, and compiled code does not see hooks attached later; attach to the "
            "uncompiled model (generate() compiles its own decoding afterwards)"
        )
    if core.tp_size is not None and core.tp_size > 1:
        raise ValueError(
            f"vlmflow: {name} is split over {core.tp_size} devices by tensor parallelism, where each would rank by its "
            "own heads and keep other tokens; use device_map instead"
        )


def _refuse_architecture(name: str, text: Any) -> None:
    if not all(hasattr(layer, "self_attn") for layer in text.layers):
        raise TypeError(
            f"vlmflow: {name} is not supported: some of its layers have no self-attention to rank or mask by "
            "(cross-attention to the image, or linear attention)"
        )
    parameters = inspect.signature(type(text.layers[0]).forward).parameters
    if "per_layer_input" in parameters:
        raise TypeError(f"vlmflow: {name} is not supported: its layers take a full-length input of their own each")
    if text.config._attn_implementation == "flex_attention":
        raise ValueError(
            f"vlmflow: {name} runs flex_attention, whose block masks cannot be narrowed; load it with "
            'attn_implementation="sdpa"'
        )
