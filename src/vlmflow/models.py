"""Load a model with its processor, and ask it about images in its own chat form."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, ProcessorMixin
from transformers.utils import logging
from transformers.utils.hub import cached_file

from vlmflow.core.errors import one_line
from vlmflow.core.geometry import GEOMETRIES, Geometry
from vlmflow.core.images import open_image as open_image  # where users look for it
from vlmflow.pico import MODEL_DIR

FAMILIES: dict[str, str] = {  # model_type -> the checkpoints that users know it by; each is tested from its config
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT (1.6)",
    "llava_onevision": "LLaVA-OneVision",
    "internvl": "InternVL 2.5, 3, 3.5 (-hf)",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM, SmolVLM2",
    "mistral3": "Mistral Small 3.1 (Pixtral tower)",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL MoE",
    "glm4v": "GLM-4.1V",
    "gemma3": "Gemma 3",
    "paligemma": "PaliGemma 1, 2",
}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class ModelError(ValueError):
    """A model cannot be loaded or gives no answers; the message says what to do."""


class ModelWarning(UserWarning):
    """A model was loaded, but something about its checkpoint should be known."""


@dataclass(frozen=True)
class Question:
    """What a model is asked: text about any number of images."""

    text: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What it said, without special tokens, and how many tokens that took."""

    text: str
    tokens: int


@dataclass(frozen=True)
class VLM:
    """A model with its processor."""

    name: str
    model: Any  # a transformers model and its processor: what they take differs from family to family
    processor: Any

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return self.model.config.get_text_config(decoder=True).num_hidden_layers

    @property
    def device(self) -> torch.device:
        """Where inputs go: to the first weight that is not offloaded, or to the CPU, from where hooks fetch them."""
        weights = (weight.device for weight in self.model.parameters() if not weight.is_meta)
        return next(weights, torch.device("cpu"))

    def encode(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        """A left-padded batch of prompts, images before text, on the model's device."""
        processor = self.processor
        batch = processor(
            text=[self._prompt(question) for question in questions],
            images=[list(question.images) for question in questions] if any(q.images for q in questions) else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return dict(batch.to(self.device, self.model.dtype))

    def _prompt(self, question: Question) -> str:
        processor = self.processor
        if not processor.chat_template:  # a model that was never taught to chat, such as PaliGemma
            return processor.image_token * len(question.images) + question.text
        content = [{"type": "image"} for _ in question.images] + [{"type": "text", "text": question.text}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def generate(self, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> list[Answer]:
        """Greedy answers to encoded questions."""
        processor, model = self.processor, self.model
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(new, skip_special_tokens=True)
        ends = torch.tensor(self._end_ids, device=new.device)
        lengths = (~torch.isin(new, ends)).cumprod(1).sum(1).tolist()
        return [Answer(text.strip(), length) for text, length in zip(texts, lengths, strict=True)]

    @property
    def _end_ids(self) -> list[int]:
        config = self.model.generation_config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        return [token for token in [*ends, config.pad_token_id] if token is not None]


def load(name: str = "pico", device: str | None = None, dtype: str = "auto", attn: str = "sdpa") -> VLM:
    """Load a model by hub id, local folder, or ``pico``, the model inside the package.

    ``dtype`` is a torch dtype's name, or ``auto`` for the checkpoint's own (float32 for pico). ``device`` is where it
    goes, by default the first accelerator, else the CPU; ``auto`` spreads its layers over all accelerators and, what
    they cannot hold, over the CPU's memory, as accelerate sees fit.

    Raises:
        ModelError: it cannot be found, has no weights or broken ones, is no image-text-to-text model, or cannot go to
            the device.
    """
    path = _path(name)
    if name == "pico" and dtype == "auto":
        dtype = "float32"  # half precision on disk only
    if dtype != "auto":
        dtype_named(dtype)
    spread = "auto" if device == "auto" else None
    logging.disable_progress_bar()
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attn,
            device_map=spread,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
        model, report = loaded
    except Exception as error:  # a broken checkpoint makes its readers raise whatever they run into
        raise ModelError(f"cannot load {name!r}: {_reason(name, error)}") from error
    if not isinstance(processor, ProcessorMixin):
        raise ModelError(f"cannot load {name!r}: it has no processor for images, so it is no image-text-to-text model")
    _check_complete(name, report)
    if not spread:
        where = device or default_device()
        try:
            nn.Module.to(model, where)
        except (RuntimeError, AssertionError, ImportError) as error:  # a torch built without the device raises any
            raise ModelError(f"cannot put {name!r} on device {where!r}: {one_line(error)}") from error
    _check_finite(name, model)
    return VLM(name, model.eval(), processor)


def _path(name: str) -> str:
    return str(MODEL_DIR) if name == "pico" else name


def _check_complete(name: str, report: Mapping[str, Collection[Any]]) -> None:
    """Refuse a checkpoint that does not fill the model: transformers draws at random what is not in it.

    ``report`` is transformers' loading info, whose missing tensors are those that are not tied to others.
    """
    missing, unused = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    wrong = [
        f"{key} is {_shape(found)}, not {_shape(wanted)}" for key, found, wanted in sorted(report["mismatched_keys"])
    ]
    if wrong:
        raise ModelError(
            f"cannot load {name!r}: tensors of a wrong shape: {_first_few(wrong)}; get the checkpoint again"
        )
    if missing:
        instead = f"; it holds others, which the model does not know: {_first_few(unused)}" if unused else ""
        raise ModelError(
            f"cannot load {name!r}: tensors that its checkpoint lacks: {_first_few(missing)}{instead}; get it complete"
        )
    if unused:
        warnings.warn(
            f"{name}: tensors of the checkpoint that the model does not use: {_first_few(unused)}",
            ModelWarning,
            stacklevel=3,
        )


def _check_finite(name: str, model: nn.Module) -> None:
    weights = [(key, weight) for key, weight in model.named_parameters() if not weight.is_meta and weight.numel()]
    broken = [key for key, weight in weights if weight.dtype in _FLOATS and not _is_finite(weight)]
    if broken:
        raise ModelError(
            f"cannot load {name!r}: tensors with values that are not finite (nan or inf): {_first_few(broken)}; "
            "get the checkpoint again, or load it in a wider dtype"
        )


def _is_finite(weight: torch.Tensor) -> bool:
    return all(math.isfinite(bound) for bound in torch.aminmax(weight.detach()))


def _first_few(names: Sequence[str]) -> str:
    """The first three of many names, and how many there are."""
    rest = f", ... ({len(names)} in all)" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def _shape(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def default_device() -> str:
    """The first accelerator, else the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else accelerator.type


def dtype_named(name: str) -> torch.dtype:
    """A torch dtype.

    Raises:
        ModelError: there is none of this name.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(f"dtype must be auto or a torch dtype such as bfloat16 or float32, got {name!r}")
    return dtype


def load_geometry(name: str) -> Geometry:
    """What decides a model's cost, read from the config of a hub id, a local folder or ``pico``.

    Raises:
        ModelError: the config cannot be read.
        ValueError: a family that is not known.
    """
    try:
        config = AutoConfig.from_pretrained(_path(name), trust_remote_code=False)
    except Exception as error:  # as in ``load``
        known = f"; built in are {', '.join(GEOMETRIES)}"
        raise ModelError(f"cannot read the config of {name!r}: {_reason(name, error)}{known}") from error
    return Geometry.from_config(config)


def _reason(name: str, error: Exception) -> str:
    text, folder = str(error), Path(name)
    if "trust_remote_code" in text:
        return (
            f"it needs code of its own ({', '.join(_own_code(name))}), and code of a checkpoint is never run; take a "
            "version of it for transformers (many have -hf in their name)"
        )
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return "the folder has no weights (*.safetensors); point to a complete checkpoint"
    if isinstance(error, SafetensorError):
        return f"its weights are broken ({one_line(error)}); get them again"
    if "Unrecognized configuration class" in text:
        return "it is no image-text-to-text model; `vlmflow models` lists the families that work"
    if not folder.exists() and ("connect" in text.lower() or "offline" in text.lower()):
        return "no such folder here, and the hub cannot be reached; check the name, or download the model first"
    return one_line(error)


def _own_code(name: str) -> list[str]:
    """The Python files that a checkpoint asks transformers to run."""
    files = set()
    for settings in ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        found = cached_file(name, settings, _raise_exceptions_for_missing_entries=False)
        references = json.loads(Path(found).read_text()).get("auto_map", {}).values() if found else ()
        for reference in chain.from_iterable(_strings(reference) for reference in references):
            files.add(reference.rpartition(".")[0].replace("--", "/") + ".py")
    return sorted(files)


def _strings(reference: Any) -> list[str]:
    """The class names in one entry of ``auto_map``: one, or a list or table of some that may be null."""
    if isinstance(reference, str):
        return [reference]
    inside = reference.values() if isinstance(reference, dict) else reference or ()
    return [name for name in inside if isinstance(name, str)]


def patch_grids(
    inputs: dict[str, torch.Tensor], config: Any, n_image: int, n_pictures: int
) -> list[tuple[int, int]] | None:
    """Rows and columns of the image tokens of each image in a prompt, None where they are not one grid an image.

    ``inputs`` is one encoded question, ``n_image`` its number of image tokens, ``n_pictures`` that of its images. The
    tokens of an image that was cut into tiles follow one another tile by tile, in no grid of the image.
    """
    if "image_grid_thw" in inputs:
        merge = config.vision_config.spatial_merge_size
        return [(int(t * h) // merge, int(w) // merge) for t, h, w in inputs["image_grid_thw"]]
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.shape[:-3].numel() != n_pictures:
        return None
    if "image_sizes" in inputs and pixels.dim() == 4:  # a Pixtral tower's; with tiles they come in five dimensions
        patch = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
        grids = [(int(height) // patch, int(width) // patch) for height, width in inputs["image_sizes"]]
    else:
        side = math.isqrt(n_image // n_pictures)
        grids = [(side, side)] * n_pictures
    return grids if sum(rows * columns for rows, columns in grids) == n_image else None


def seen_images(inputs: dict[str, torch.Tensor], images: Sequence[Image.Image]) -> list[Image.Image]:
    """The images as the model sees them: resized and cropped, less padding, where its pixels still form a picture."""
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.dim() != 4 or pixels.shape[0] != len(images):
        return list(images)
    sizes = inputs.get("image_sizes", [pixels.shape[2:]] * len(images))
    return [_picture(own[:, :height, :width]) for own, (height, width) in zip(pixels, sizes, strict=True)]


def _picture(pixels: torch.Tensor) -> Image.Image:
    """Normalised pixels, each channel from its lowest to its highest value."""
    array = pixels.float().cpu().numpy().transpose(1, 2, 0)
    low, high = array.min((0, 1)), array.max((0, 1))
    return Image.fromarray(((array - low) / np.maximum(high - low, 1e-6) * 255).astype(np.uint8))
