"""Load a model with its processor, and ask it about images in its own chat form."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import logging

from vlmflow.geometry import GEOMETRIES, Geometry
from vlmflow.pico import MODEL_DIR
from vlmflow.processors import load_processor

FAMILIES: dict[str, str] = {  # model_type -> the checkpoints that users know it by; each is tested as a whole
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
BY_TOKEN = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}  # inputs with a number a token
MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs


class ModelError(ValueError):
    """A model cannot be loaded; the message says what to do."""


class ImageError(ValueError):
    """A file is no image that can be read; the message says what to do."""


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
        seeing = [question for question in questions if question.images]
        blind = [question for question in questions if not question.images]
        if not blind:
            batch = self._encode_images(seeing)
        elif not seeing:
            batch = self._encode_text(blind)
        else:  # apart, since some processors refuse a prompt without images, or misplace its start, in such a batch
            has_images = torch.tensor([bool(question.images) for question in questions])
            padding = self.processor.tokenizer.pad_token_id
            batch = _interleave(self._encode_images(seeing), self._encode_text(blind), has_images, padding)
        dtype = self.model.dtype
        return {key: t.to(self.device, dtype if t.is_floating_point() else t.dtype) for key, t in batch.items()}

    def _encode_images(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        prompts = [self._prompt(question) for question in questions]
        images = [list(question.images) for question in questions]
        batch = self.processor(text=prompts, images=images, **self._text_options(prompts))
        return {key: value for key, value in batch.items() if key != "labels"}  # PaliGemma's, of no use for an answer

    def _encode_text(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        prompts = [self._prompt(question) for question in questions]
        types = "token_type_ids" in self.processor.model_input_names
        return dict(self.processor.tokenizer(prompts, return_token_type_ids=types, **self._text_options(prompts)))

    def _text_options(self, prompts: Sequence[str]) -> dict[str, Any]:
        start = self.processor.tokenizer.bos_token
        started = start is not None and prompts[0].startswith(start)  # by the chat template; a second start would harm
        return {
            "padding": True,
            "padding_side": "left",
            "return_tensors": "pt",
            "add_special_tokens": not started,
        }

    def _prompt(self, question: Question) -> str:
        processor = self.processor
        if not processor.chat_template:  # a model that was never taught to chat, such as PaliGemma
            if question.images:
                return processor.image_token * len(question.images) + question.text
            return f"{processor.tokenizer.bos_token or ''}{question.text}\n"  # as its processor ends those with images
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
    path = str(MODEL_DIR) if name == "pico" else name
    if name == "pico" and dtype == "auto":
        dtype = "float32"  # half precision on disk only
    if dtype != "auto":
        dtype_named(dtype)
    spread = "auto" if device == "auto" else None
    logging.disable_progress_bar()
    try:
        processor = load_processor(path)
        model = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation=attn, device_map=spread
        )
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise ModelError(f"cannot load {name!r}: {_reason(name, error)}") from error
    if spread:
        return VLM(name, model.eval(), processor)
    where = device or default_device()
    try:
        nn.Module.to(model, where).eval()
    except (RuntimeError, AssertionError, ImportError) as error:  # a torch built without the device raises any of them
        raise ModelError(f"cannot put {name!r} on device {where!r}: {_first_line(error)}") from error
    return VLM(name, model, processor)


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
    """What decides a model's cost: built in, or read from the config of a hub id, a local folder or ``pico``.

    Raises:
        ModelError: the config cannot be read.
        ValueError: a family that is not known.
    """
    if name in GEOMETRIES:
        return GEOMETRIES[name]
    try:
        config = AutoConfig.from_pretrained(MODEL_DIR if name == "pico" else name)
    except (OSError, ValueError, KeyError) as error:
        known = f"; built in are {', '.join(GEOMETRIES)}"
        raise ModelError(f"cannot read the config of {name!r}: {_reason(name, error)}{known}") from error
    return Geometry.from_config(config)


def _reason(name: str, error: Exception) -> str:
    text, folder = str(error), Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return "the folder has no weights (*.safetensors); point to a complete checkpoint"
    if isinstance(error, SafetensorError):
        return f"its weights are broken ({_first_line(error)}); get them again"
    if "Unrecognized configuration class" in text:
        return "it is no image-text-to-text model; `vlmflow models` lists the families that work"
    if not folder.exists() and ("connect" in text.lower() or "offline" in text.lower()):
        return "no such folder here, and the hub cannot be reached; check the name, or download the model first"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def open_image(path: str | Path) -> Image.Image:
    """Read an image file whole, as RGB.

    Raises:
        ImageError: missing, empty, broken, too large, or no image.
    """
    path = Path(path)
    if not path.is_file():
        raise ImageError(f"no image file at {path}")
    if path.stat().st_size == 0:
        raise ImageError(f"the image file {path} is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except UnidentifiedImageError as error:
            raise ImageError(f"{path} is no image (wanted PNG, JPEG, WebP, ...)") from error
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ImageError(f"the image {path} has more than {MAX_PIXELS:,} pixels; make it smaller first") from error
        except (OSError, SyntaxError) as error:
            raise ImageError(f"the image {path} is broken ({_first_line(error)}); get an intact copy") from error


def _interleave(
    first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], of_first: Bool[Tensor, " batch"], padding: int
) -> dict[str, torch.Tensor]:
    """One left-padded batch of two, the second without images; ``of_first`` says which samples are the first's."""
    widths = [part["input_ids"].shape[1] for part in (first, second)]
    batch = dict(first)
    for key in BY_TOKEN & first.keys():
        whole = torch.full((len(of_first), max(widths)), padding if key == "input_ids" else 0)
        whole[of_first, -widths[0] :] = first[key]
        if key in second:
            whole[~of_first, -widths[1] :] = second[key]
        batch[key] = whole
    return batch


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
