"""A small model of every type with the inputs that it wants: text around an image, alone and in left-padded batches.

``PICTURES`` says which tensors one image is: a tuple is the shape of noise, a list is the values themselves. As many
image tokens stand for it as its features have rows, which is asked of the model.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import shrink
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutputWithPooling

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
        "aria aya_vision blip-2 chameleon cohere2_vision deepseek_ocr2 deepseek_vl gemma3 got_ocr2 internvl janus "
        "llama4 llava ovis2 paligemma pp_chart2table qianfan_ocr qwen shieldgemma2 step3p7 vipllava",
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
    **each("minicpm_ocr", pixel_values=(1, 3, 4, 256), target_sizes=[[8, 8]]),
    **each("minicpmv4_6 minicpmv4_7", pixel_values=(1, 4, WIDTH), target_sizes=[[8, 8]]),
    **each(
        "phi4_multimodal", image_pixel_values=(1, 2, 3, 32, 32), image_attention_mask=[[[[True] * 8] * 8] * 2], **SIZES
    ),
    **each("deepseek_vl_hybrid", pixel_values=SQUARE, high_res_pixel_values=SQUARE),
    **each("video_llava", pixel_values_images=SQUARE),
    **each("instructblip", pixel_values=SQUARE, qformer_input_ids=[[3, 4, 5, 6, 7]]),
    **each("instructblipvideo", pixel_values=(1, 2, 3, 32, 32), qformer_input_ids=[[3, 4, 5, 6, 7]]),
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
    **each("fast_vlm gemma3n gemma4_unified perception_lm", pixel_values=(1, 16, WIDTH)),
    **each("hunyuan_vl", pixel_values=(1, 20, WIDTH), **GRID),  # with line ends
    **each("dots3_note kimi_k25 muse_glimmer muse_spark", pixel_values=(1, 16, WIDTH), **GRID),
}
# Where features have another number of rows, or are not to be had by themselves.
COUNTS = {"blip-2": 32, "instructblip": 32, "instructblipvideo": 64, "fuyu": 16, "granite4_vision": 36}
COUNTS |= {"phi4_multimodal": 41, "video_llava": 64}
FORWARD_ONLY = ("image_num_crops",)  # what features are not computed from
# Types whose tower is timm's, or too particular to be made small: their "pixels" are the features themselves, which
# they take as one tensor, or as one for each image.
STOOD_IN = {
    **dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm"), torch.clone),
    **dict.fromkeys(("dots3_note", "gemma4_unified", "hunyuan_vl", "kimi_k25", "muse_glimmer"), tuple),
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "muse_spark"), tuple),
}
JOINED_ALONG = {"minicpm_ocr": 3, "minicpmv4_6": 1, "minicpmv4_7": 1}  # an axis other than the first
BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
NEW = 3  # tokens of an answer


@dataclass(frozen=True, eq=False)
class Family:
    """A small model of one type, in eager mode until a test says otherwise."""

    name: str
    whole: hf.PreTrainedModel  # what is pruned
    model: hf.PreTrainedModel  # what is asked: the whole, or the part of it that reads and writes text
    _unpruned: dict[str, tuple[Tensor, GenerateDecoderOnlyOutput]] = field(default_factory=dict)

    @property
    def decoder(self) -> hf.PreTrainedModel:
        """Found by its layers, of which towers have fewer: what models name themselves may be more, or a tower."""
        return next(part for part in self.model.modules() if len(getattr(part, "layers", ())) == shrink.LAYERS)

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """Two prompts of different length around one image each."""
        return self.sample(5, 7, seed=1), self.sample(3, 13, seed=2)

    @torch.no_grad()
    def logits(self, sample: Sample) -> Tensor:
        return self.model(**sample).logits

    def answer(self, sample: Sample) -> GenerateDecoderOnlyOutput:
        """Greedy tokens and their logits."""
        return self.model.generate(
            **sample,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )

    def unpruned(self, kernel: str) -> tuple[Tensor, GenerateDecoderOnlyOutput]:
        """What the batch becomes on this kernel, on which the model already is, before anybody has pruned anything."""
        if kernel not in self._unpruned:
            self._unpruned[kernel] = self.logits(self.batch), self.answer(self.batch)
        return self._unpruned[kernel]

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
        names = [name for name in self.samples[0] if name not in BY_TOKEN]
        media = {name: self._join(name, [sample[name] for sample in self.samples]) for name in names}
        return self._with_ids(ids, mask, media)

    def _join(self, name: str, tensors: list[Tensor]) -> Tensor:
        if name == "image_token_pooling":  # which numbers the patches of all images through
            tensors = [tensor + 64 * number for number, tensor in enumerate(tensors)]
        return torch.cat(tensors, JOINED_ALONG.get(kind(self.name), 0) if name == "pixel_values" else 0)

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
    for weight in (weight for path, weight in model.named_parameters() if path.endswith("sinks")):
        weight.data[::2] = 30.0  # small ones leave rankings as they are
    settings = model.generation_config
    settings.eos_token_id = settings.forced_bos_token_id = settings.forced_eos_token_id = settings.suppress_tokens = (
        None
    )
    settings.pad_token_id = PAD
    if form := STOOD_IN.get(kind(name)):
        model.model.get_image_features = lambda pixel_values, *_, **__: BaseModelOutputWithPooling(
            last_hidden_state=pixel_values, pooler_output=form(pixel_values)
        )
    return Family(name, whole, model)
