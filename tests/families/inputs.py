"""A small model of every type with the inputs that it wants: text around an image, alone and in left-padded batches.

``PICTURES`` says which tensors one image is: a tuple is the shape of noise, a list is the values themselves. How many image
tokens stand for it is asked of the model: as many as its image features have rows.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

import shrink
import tiny
from tiny import DEVICE, END, IMAGE, PAD, START, Sample

SQUARE, WIDTH = (1, 3, 32, 32), 64
GRID, SIZES = {"image_grid_thw": [[1, 8, 8]]}, {"image_sizes": [[32, 32]]}
PLACES = [[[x, y] for y in range(12) for x in range(12)]]
POOLED = [[*range(4 * row, 4 * row + 4)] for row in range(16)]


def each(names: str, **tensors: Any) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(names.split(), tensors)


PICTURES = {
    **each(
        "aria aya_vision blip-2 chameleon cohere2_vision deepseek_ocr2 deepseek_vl gemma3 got_ocr2 internvl janus llama4 "
        "llava ovis2 paligemma pp_chart2table qianfan_ocr shieldgemma2 step3p7 vipllava",
        pixel_values=SQUARE,
    ),
    **each(
        "cohere_compass cosmos3_omni exaone4_5 glm46v glm4v glm4v_moe glm_ocr glmga hyperclovax_vision_v2 lfm3_vl "
        "minimax_m3_vl qwen2_5_omni qwen2_5_omni_thinker qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_omni_moe "
        "qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe",
        pixel_values=(64, 96),
        **GRID,
    ),
    **each("cosmos3_edge ernie4_5_vl_moe", pixel_values=(64, 48), **GRID),
    **each("paddleocr_vl", pixel_values=(64, 3, 4, 4), **GRID),
    **each("video_llama_3", pixel_values=(64, 48), image_merge_sizes=[2], **GRID),
    **each("idefics2 idefics3 smolvlm", pixel_values=(1, *SQUARE)),
    **each("granite_docling", pixel_values=(1, *SQUARE), pixel_attention_mask=[[True]]),
    **each("emu3 lighton_ocr mistral3 mistral_large4", pixel_values=SQUARE, **SIZES),
    **each("granite4_vision llava_next llava_next_video llava_onevision", pixel_values=(1, 2, 3, 32, 32), **SIZES),
    **each("minicpmv4_6 minicpmv4_7 minicpm_ocr", pixel_values=(1, 3, 4, 256), target_sizes=[[8, 8]]),
    **each("deepseek_vl_hybrid", pixel_values=SQUARE, high_res_pixel_values=SQUARE),
    **each("video_llava", pixel_values_images=SQUARE),
    **each("instructblip", pixel_values=SQUARE, qformer_input_ids=[[3, 4, 5, 6, 7]]),
    **each("lfm2_vl", pixel_values=(1, 64, 48), spatial_shapes=[[8, 8]], pixel_attention_mask=[[1] * 64]),
    **each("gemma4", pixel_values=(1, 144, 48), image_position_ids=PLACES),
    **each("fuyu", image_patches=(1, 16, 2700)),
    **each(
        "molmo2",
        pixel_values=(1, 64, 48),
        image_token_pooling=POOLED,
        image_grids=[[4, 4, 0, 0]],
        image_num_crops=[1],
    ),
    **each("fast_vlm gemma3n gemma4_unified inkling_mm_model unlimited_ocr", pixel_values=(1, 16, WIDTH)),
    **each("hunyuan_vl", pixel_values=(1, 20, WIDTH), **GRID),  # with line ends
    **each("dots3_note inkling2 kimi_k25 muse_glimmer muse_spark", pixel_values=(1, 16, WIDTH), **GRID),
}
COUNTS = {"blip-2": 32, "fuyu": 16, "granite4_vision": 36, "instructblip": 32, "video_llava": 64}  # not so many rows
FORWARD_ONLY = ("image_num_crops",)  # what image features are not computed from
# Their towers are of timm, or too particular to be made small: the "pixels" are the image features. Some models take them as
# a tensor, others as one for each image.
STOOD_IN = {
    **dict.fromkeys(("fast_vlm", "gemma3n", "inkling_mm_model"), torch.clone),
    **dict.fromkeys(("dots3_note", "gemma4_unified", "hunyuan_vl", "inkling2", "kimi_k25", "muse_glimmer"), tuple),
    **dict.fromkeys(("muse_spark", "unlimited_ocr"), tuple),
}
STRIPS = dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), ("pixel_values",))  # images side by side
BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


@dataclass(frozen=True, eq=False)
class Family:
    """A small model of one type, in eager mode until a test says otherwise."""

    name: str
    whole: hf.PreTrainedModel  # what is pruned
    model: hf.PreTrainedModel  # what is asked: the whole, or the part of it that reads and writes text

    @property
    def decoder(self) -> nn.Module:
        inside = self.model.get_decoder().modules()  # which some name with its head, or with what is around the layers
        return next(module for module in inside if isinstance(getattr(module, "layers", None), nn.ModuleList))

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """Two prompts of different length around one image each."""
        return self.sample(5, 7, seed=1), self.sample(3, 13, seed=2)

    def sample(self, before: int, after: int, seed: int) -> Sample:
        """So much text before an image and so much after it; batch dimension 1."""
        rng = torch.Generator().manual_seed(seed)
        media = {
            key: torch.randn(value, generator=rng) if isinstance(value, tuple) else torch.tensor(value)
            for key, value in PICTURES[kind(self.name)].items()
        }
        image = [START, *[IMAGE] * self._count(media), END]
        ids = torch.tensor([[*tiny.text(before, rng), *image, *tiny.text(after, rng)]])
        return self._with_ids(ids, torch.ones_like(ids), media)

    @cached_property
    def batch(self) -> Sample:
        """The samples, padded on the left."""
        width = max(sample["input_ids"].shape[1] for sample in self.samples)
        ids, mask = (
            torch.cat([F.pad(s[key], (width - s[key].shape[1], 0), value=PAD) for s in self.samples])
            for key in ("input_ids", "attention_mask")
        )
        media = {
            key: torch.cat([sample[key] for sample in self.samples], 3 if key in STRIPS.get(kind(self.name), ()) else 0)
            for key in self.samples[0]
            if key not in BY_TOKEN
        }
        return self._with_ids(ids, mask, media)

    def extend(self, sample: Sample, token: int) -> Sample:
        """A sample and one generated token after it."""
        more = {"input_ids": token, "attention_mask": 1, "token_type_ids": int(self.name.startswith("paligemma"))}
        return {
            key: F.pad(value, (0, 1), value=more.get(key, 0)) if key in BY_TOKEN else value
            for key, value in sample.items()
        }

    @torch.no_grad()
    def _count(self, media: Sample) -> int:
        """How many image tokens an image is."""
        if kind(self.name) in COUNTS:
            return COUNTS[kind(self.name)]
        read = getattr(self.model, "get_image_features", None) or self.model.model.get_image_features
        return rows(read(**{key: value for key, value in media.items() if key not in FORWARD_ONLY}))

    def _with_ids(self, ids: Tensor, mask: Tensor, media: Sample) -> Sample:
        image, wanted = (ids == IMAGE).long(), inspect.signature(self.model.forward).parameters
        marks_images = self.name.startswith(("gemma3", "shieldgemma2"))  # PaliGemma: the suffix, which a prompt has not
        types = {
            "mm_token_type_ids": image,
            "moe_mm_token_type_ids": image,
            "token_type_ids": image if marks_images else torch.zeros_like(ids),
        }
        types = {key: value for key, value in types.items() if key in wanted}
        return {"input_ids": ids, "attention_mask": mask, **types, **media}


def kind(name: str) -> str:
    """The ``model_type`` of a variant."""
    return name.partition("@")[0]


def rows(features: Any) -> int:
    """How many rows image features have, in whatever form a model hands them out."""
    if isinstance(features, Tensor):
        return features[..., 0].numel()
    if isinstance(features, (list, tuple)):
        return sum(map(rows, features))
    return rows(features.last_hidden_state if features.pooler_output is None else features.pooler_output)


def build(name: str) -> Family:
    """A small model of one type, its weights drawn as ``tiny`` draws them."""
    whole = shrink.build(name).float().to(DEVICE).eval()
    model = getattr(whole, "thinker", whole)
    tiny.randomize(model)
    settings = model.generation_config
    settings.eos_token_id = settings.forced_bos_token_id = settings.forced_eos_token_id = settings.suppress_tokens = None
    settings.pad_token_id = PAD
    if form := STOOD_IN.get(kind(name)):
        model.model.get_image_features = lambda pixel_values, *_, **__: BaseModelOutputWithPooling(
            last_hidden_state=pixel_values, pooler_output=form(pixel_values)
        )
    return Family(name, whole, model)
