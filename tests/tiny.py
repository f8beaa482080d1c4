"""Tiny vision-language models with random weights, and inputs for them: no hub, no tokenizer, no processor.

``build(name)`` gives a ``Tiny``: a model of one family, made from its config alone, and the means to write
samples for it. A sample is described by its segments, in prompt order: an int is that many text tokens,
``"image"`` or ``"video"`` is one of the default size; where the family knows sizes, ``(height, width)`` is an
image and ``(frames, height, width)`` a video of that size in pixels.

Query and key weights of the text decoder are large, so that attention is far from uniform and rankings have
real margins. Models are cached and shared: tests never modify them. They and their samples are on the device that
``VLMFLOW_DEVICE`` names; what is random is drawn on the CPU, so that it is the same everywhere.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor

from vlmflow.models.qwen_vl import QwenVLConfig, register

PAD, IMAGE, VIDEO, START, END, ROW = 0, 100, 101, 102, 103, 104  # ids from IMAGE on are special
VOCAB, PATCH = 128, 4
DEVICE = os.environ.get("VLMFLOW_DEVICE", "cpu")

Size = tuple[int, ...]
Segment = int | str | Size
Sample = dict[str, Tensor]
Picture = tuple[list[int], Sample]  # the token ids of one image or video, and its tensors
Draw = Callable[[Size, torch.Generator], Picture]


@dataclass(frozen=True, eq=False)
class Tiny:
    """A model of one family, and the inputs that its forward wants."""

    name: str
    model: hf.PreTrainedModel
    drawers: dict[str, tuple[Size, Draw]]  # "image", "video" -> default size, and how one is drawn
    specs: Sequence[Sequence[Segment]]

    def sample(self, segments: Sequence[Segment], seed: int = 0) -> Sample:
        """One unpadded sample, batch dimension 1."""
        rng = torch.Generator().manual_seed(seed)
        ids, parts = [], []
        for segment in segments:
            if isinstance(segment, int):
                ids += text(segment, rng)
            else:
                kind = segment if isinstance(segment, str) else {2: "image", 3: "video"}[len(segment)]
                default, draw = self.drawers[kind]
                tokens, tensors = draw(default if isinstance(segment, str) else segment, rng)
                ids += tokens
                parts.append(tensors)
        media = join(parts)
        if self.name in ("idefics3", "smolvlm"):  # these two want (batch, images of a sample, ...)
            media = {key: value[None] for key, value in media.items()}
        return self._with_ids(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), media)

    def collate(self, samples: Sequence[Sample]) -> Sample:
        """Make a left-padded batch of unpadded samples."""
        width = max(s["input_ids"].shape[1] for s in samples)
        ids, mask = (
            torch.cat([F.pad(s[key], (width - s[key].shape[1], 0), value=PAD) for s in samples])
            for key in ("input_ids", "attention_mask")
        )
        by_token = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
        media = [{key: value for key, value in s.items() if key not in by_token} for s in samples]
        return self._with_ids(ids, mask, join(media))

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """The usual samples: text around an image, two images, a shorter one; for some a video or a text."""
        return tuple(self.sample(spec, seed) for seed, spec in enumerate(self.specs))

    def _with_ids(self, ids: Tensor, mask: Tensor, media: Sample) -> Sample:
        wanted = inspect.signature(self.model.forward).parameters
        image, video = (ids == IMAGE).long(), (ids == VIDEO).long()
        types = {}
        if "mm_token_type_ids" in wanted:  # Qwen and GLM since 5.1 to 5.3
            types["mm_token_type_ids"] = image + 2 * video
        if "token_type_ids" in wanted:  # Gemma3 marks images, PaliGemma the suffix, which a prompt has not
            types["token_type_ids"] = image if self.name.startswith("gemma3") else torch.zeros_like(ids)
        tensors = {"input_ids": ids, "attention_mask": mask, **types, **media}
        return {key: tensor.to(DEVICE) for key, tensor in tensors.items()}


def text(n: int, rng: torch.Generator) -> list[int]:
    return torch.randint(3, 90, (n,), generator=rng).tolist()


def join(parts: Sequence[Sample]) -> Sample:
    """Concatenate tensors of the same name along dim 0, the other dims padded with zeros to the largest."""
    out = {}
    for key in sorted({key for part in parts for key in part}):
        tensors = [part[key] for part in parts if key in part]
        shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
        out[key] = torch.cat([enlarge(t, shape) for t in tensors])
    return out


def enlarge(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    missing = [large - small for large, small in zip(shape, tensor.shape[1:], strict=True)]
    return F.pad(tensor, [pad for n in reversed(missing) for pad in (0, n)])


# -- how each family draws an image


def fixed(n_tokens: int, side: int, around: bool = False) -> Draw:
    """Images of one size, ``n_tokens`` each, between start and end markers if ``around``."""

    def draw(size: Size, rng: torch.Generator) -> Picture:
        assert size == (side, side), f"this family's images are {side} x {side}, got {size}"
        ids = [IMAGE] * n_tokens
        pixels = torch.randn(1, 3, side, side, generator=rng)
        return [START, *ids, END] if around else ids, {"pixel_values": pixels}

    return draw


def internvl_image(size: Size, rng: torch.Generator) -> Picture:
    """As many tiles as fit, and a thumbnail if more than one, all in one run of image tokens."""
    tiles = (size[0] // 32) * (size[1] // 32)
    tiles += tiles > 1
    pixels = torch.randn(tiles, 3, 32, 32, generator=rng)
    return [START, *[IMAGE] * (16 * tiles), END], {"pixel_values": pixels}


def idefics_image(size: Size, rng: torch.Generator) -> Picture:
    """Tiles, each after its own marker tokens, then the whole image."""
    tiles = (size[0] // 32) * (size[1] // 32)
    tiles = tiles + 1 if tiles > 1 else 1
    ids = [i for tile in range(tiles) for i in (START, ROW + tile, *[IMAGE] * 16)]
    return [*ids, START], {"pixel_values": torch.randn(tiles, 3, 32, 32, generator=rng)}


def anyres_image(size: Size, rng: torch.Generator) -> Picture:
    """The whole image, then its tiles with a newline token after each row; size is a grid pinpoint."""
    assert list(size) in PINPOINTS, f"this family's images have one of the sizes {PINPOINTS}, got {size}"
    (h, w), tile, patch = size, 16, 8
    n = (tile // patch) ** 2 + (h // patch) * (w // patch + 1)
    pixels = torch.randn(1, 1 + (h // tile) * (w // tile), 3, tile, tile, generator=rng)
    return [IMAGE] * n, {"pixel_values": pixels, "image_sizes": torch.tensor([size])}


def onevision_video(size: Size, rng: torch.Generator) -> Picture:
    """One pooled token per frame (a grid of 2 x 2 patches), and one newline at the end."""
    pixels = torch.randn(1, size[0], 3, 16, 16, generator=rng)
    return [VIDEO] * (size[0] + 1), {"pixel_values_videos": pixels}


def pixtral_image(size: Size, rng: torch.Generator) -> Picture:
    """Rows of merged patches with a break after each row, and an end marker instead of the last break."""
    rows, columns = size[0] // (2 * PATCH), size[1] // (2 * PATCH)
    ids = ([IMAGE] * columns + [START]) * rows
    pixels = torch.randn(1, 3, *size, generator=rng)
    return [*ids[:-1], END], {"pixel_values": pixels, "image_sizes": torch.tensor([size])}


def siglip2_image(size: Size, rng: torch.Generator) -> Picture:
    """Patches in a row, as many as the size has."""
    rows, columns = size[0] // PATCH, size[1] // PATCH
    return [START, *[IMAGE] * (rows * columns // 4), END], {
        "pixel_values": torch.randn(1, rows * columns, 3 * PATCH * PATCH, generator=rng),
        "spatial_shapes": torch.tensor([[rows, columns]]),
        "pixel_attention_mask": torch.ones(1, rows * columns, dtype=torch.long),
    }


def qwen_patches(size: Size, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    grid = torch.tensor([size[0] // 2, size[1] // PATCH, size[2] // PATCH])
    return torch.randn(int(grid.prod()), 3 * 2 * PATCH * PATCH, generator=rng), grid[None]


def qwen_image(size: Size, rng: torch.Generator) -> Picture:
    pixels, grid = qwen_patches((2, *size), rng)
    return [START, *[IMAGE] * (len(pixels) // 4), END], {"pixel_values": pixels, "image_grid_thw": grid}


def qwen_video(size: Size, rng: torch.Generator) -> Picture:
    pixels, grid = qwen_patches(size, rng)
    ids = [START, *[VIDEO] * (len(pixels) // 4), END]
    return ids, {"pixel_values_videos": pixels, "video_grid_thw": grid}


def qwen3_video(size: Size, rng: torch.Generator) -> Picture:
    """Timestamp text before each frame."""
    pixels, grid = qwen_patches(size, rng)
    frames = int(grid[0, 0])
    frame = [START, *[VIDEO] * (len(pixels) // 4 // frames), END]
    ids = [i for _ in range(frames) for i in (*text(3, rng), *frame)]
    return ids, {"pixel_values_videos": pixels, "video_grid_thw": grid}


# -- the families: config class name, config, samples

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 64,
    "in_channels": 3,
}
DEEPSTACK = {"depth": 4, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}
VISION_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
PINPOINTS = [[16, 32], [32, 16], [32, 32]]
HEAD = {"head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

PLAIN = ([5, "image", 7], [3, "image", 4, "image", 6], [2, "image", 5])


def mrope(*section: int, **more: object) -> dict:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [*section]}
    return {"rope_parameters": {**rope, **more}}


def llava(layers: int):
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT, num_hidden_layers=layers),
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=30, patch_size=6, projection_dim=32),
        image_token_index=IMAGE,
        image_seq_length=25,
    )
    return config, {"image": ((30, 30), fixed(25, 30))}, (*PLAIN, [11])


def llava_next(layers: int):
    config = hf.LlavaNextConfig(
        text_config=hf.LlamaConfig(**TEXT, num_hidden_layers=layers),
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=16, patch_size=8, projection_dim=32),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )
    specs = ([5, "image", 7], [3, (32, 16), 4, (16, 32), 6], [2, (32, 32), 5])
    return config, {"image": ((32, 32), anyres_image)}, specs


def llava_onevision(layers: int):
    config = hf.LlavaOnevisionConfig(
        text_config=hf.Qwen2Config(**TEXT, num_hidden_layers=layers),
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=16, patch_size=8, vision_use_head=False),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
    )
    specs = ([5, "image", 7], [3, (32, 16), 4, (16, 32), 6], [2, (32, 32), 5], [4, "video", 6])
    return config, {"image": ((32, 32), anyres_image), "video": ((12, 16, 16), onevision_video)}, specs


def internvl(layers: int):
    config = hf.InternVLConfig(
        text_config=hf.Qwen2Config(**TEXT, num_hidden_layers=layers),
        vision_config=hf.InternVLVisionConfig(**VISION, image_size=[32, 32], patch_size=[PATCH, PATCH]),
        image_token_id=IMAGE,
        image_seq_length=16,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    specs = ([5, "image", 7], [3, (32, 64), 4, "image", 6], [2, "image", 5])
    return config, {"image": ((32, 32), internvl_image)}, specs


def idefics3(layers: int, config_class: str = "Idefics3Config"):
    config = getattr(hf, config_class)(
        text_config=hf.LlamaConfig(**TEXT, num_hidden_layers=layers),
        vision_config={**VISION, "image_size": 32, "patch_size": PATCH},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    specs = ([5, (32, 64), 7], [3, "image", 4, "image", 6], [2, "image", 5])
    return config, {"image": ((32, 32), idefics_image)}, specs


def smolvlm(layers: int):
    return idefics3(layers, "SmolVLMConfig")


def mistral3(layers: int):
    config = hf.Mistral3Config(
        text_config=hf.MistralConfig(**TEXT, **HEAD, num_hidden_layers=layers, sliding_window=None),
        vision_config=hf.PixtralVisionConfig(**VISION, image_size=32, patch_size=PATCH, head_dim=8),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    specs = ([5, "image", 7], [3, (16, 32), 4, (24, 8), 6], [2, (24, 24), 5])
    return config, {"image": ((32, 32), pixtral_image)}, specs


def qwen(layers: int):
    register()
    config = QwenVLConfig(
        text_config=hf.Qwen2Config(**TEXT, num_hidden_layers=layers),
        vision_config={
            **VISION,
            "image_size": 32,
            "patch_size": PATCH,
            "num_queries": 16,
            "output_dim": 64,
            "pooling_heads": 2,
        },
        image_token_id=IMAGE,
    )
    return config, {"image": ((32, 32), fixed(16, 32, around=True))}, PLAIN


QWEN_SPECS = ([5, "image", 7], [3, (16, 48), 4, (16, 16), 6], [2, (24, 24), 5])
QWEN_DRAWERS = {"image": ((32, 32), qwen_image), "video": ((6, 16, 24), qwen_video)}


def qwen2_vl(layers: int):
    vision = {k: v for k, v in QWEN_VISION.items() if k not in ("intermediate_size", "out_hidden_size")}
    config = hf.Qwen2VLConfig(
        text_config={**TEXT, **mrope(2, 3, 3), "num_hidden_layers": layers},
        vision_config={**vision, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        **VISION_IDS,
    )
    return config, QWEN_DRAWERS, (*QWEN_SPECS, [4, "video", 6])


def qwen2_5_vl(layers: int):
    config = hf.Qwen2_5_VLConfig(
        text_config={**TEXT, **mrope(2, 3, 3), "num_hidden_layers": layers},
        vision_config={**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        **VISION_IDS,
    )
    return config, QWEN_DRAWERS, (*QWEN_SPECS, [4, "video", 6])


def qwen3_vl(layers: int, config_class: str = "Qwen3VLConfig", **more: object):
    rope = mrope(4, 2, 2, mrope_interleaved=True)
    config = getattr(hf, config_class)(
        text_config={**TEXT, **HEAD, **rope, **more, "num_hidden_layers": layers},
        vision_config={**QWEN_VISION, **DEEPSTACK},
        **VISION_IDS,
    )
    drawers = {"image": ((32, 32), qwen_image), "video": ((6, 16, 24), qwen3_video)}
    return config, drawers, (*QWEN_SPECS, [4, "video", 6])


def qwen3_vl_moe(layers: int):
    return qwen3_vl(layers, "Qwen3VLMoeConfig", **EXPERTS, decoder_sparse_step=1)


def qwen3_5(layers: int, config_class: str = "Qwen3_5Config", **more: object):
    config = getattr(hf, config_class)(
        text_config={
            **TEXT,
            **HEAD,
            **mrope(1, 1, 0, mrope_interleaved=True, partial_rotary_factor=0.25),
            "num_hidden_layers": layers,
            "layer_types": [("linear_attention", "full_attention")[i % 2] for i in range(layers)],
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_num_value_heads": 4,
            "linear_value_head_dim": 8,
            **more,
        },
        vision_config={**QWEN_VISION, "num_position_embeddings": 64},
        **VISION_IDS,
    )
    return config, {"image": ((32, 32), qwen_image)}, QWEN_SPECS


def qwen3_5_moe(layers: int):
    return qwen3_5(layers, "Qwen3_5MoeConfig", **EXPERTS, shared_expert_intermediate_size=48)


def lfm2_vl(layers: int):
    text = {key: value for key, value in TEXT.items() if key != "tie_word_embeddings"}
    config = hf.Lfm2VlConfig(
        text_config={
            **text,
            "num_hidden_layers": layers,
            "layer_types": [("conv", "full_attention")[i % 2] for i in range(layers)],
            "block_multiple_of": 32,
        },
        vision_config=hf.Siglip2VisionConfig(**VISION, num_patches=64, patch_size=PATCH, vision_use_head=False),
        image_token_id=IMAGE,
        projector_hidden_size=48,
        tie_word_embeddings=False,
    )
    return config, {"image": ((32, 32), siglip2_image)}, QWEN_SPECS


def glm4v(layers: int):
    rope = mrope(2, 1, 1, partial_rotary_factor=0.5)
    config = hf.Glm4vConfig(
        text_config={**TEXT, **rope, "num_hidden_layers": layers},
        vision_config={**QWEN_VISION, "image_size": 32},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=ROW,
        video_end_token_id=ROW + 1,
    )
    return config, {"image": ((32, 32), qwen_image)}, QWEN_SPECS


def gemma3(layers: int, window: int = 512):
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    scale = {"query_pre_attn_scalar": 16, "sliding_window": window, "layer_types": kinds}
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**TEXT, **HEAD, **scale, num_hidden_layers=layers),
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=32, patch_size=PATCH, vision_use_head=False),
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=False,
    )
    return config, {"image": ((32, 32), fixed(16, 32, around=True))}, PLAIN


def gemma3_window(layers: int):
    return gemma3(layers, window=14)


def paligemma(layers: int):
    config = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**TEXT, **HEAD, num_hidden_layers=layers),
        vision_config=hf.SiglipVisionConfig(
            **VISION, image_size=16, patch_size=PATCH, vision_use_head=False, projection_dim=64
        ),
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
        tie_word_embeddings=False,
    )
    specs = (["image", 7], ["image", 4, "image", 6], [3, "image", 5])  # its prompts begin with the image
    return config, {"image": ((16, 16), fixed(16, 16))}, specs


FAMILIES = {
    family.__name__: family
    for family in (
        llava,
        llava_next,
        llava_onevision,
        internvl,
        idefics3,
        smolvlm,
        mistral3,
        qwen,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        qwen3_vl_moe,
        glm4v,
        gemma3,
        gemma3_window,
        paligemma,
    )
}


RECURRENT = {
    family.__name__: family for family in (qwen3_5, qwen3_5_moe, lfm2_vl)
}  # tests/families has the laws on these


def build(name: str, attn: str = "sdpa", layers: int = 6) -> Tiny:
    """The tiny model of one family; cached, so that equal calls share one model."""
    return _build(name, attn, layers)


@cache
def _build(name: str, attn: str, layers: int) -> Tiny:
    config, drawers, specs = {**FAMILIES, **RECURRENT}[name](layers)
    with torch.random.fork_rng():
        model = hf.AutoModelForImageTextToText.from_config(config, attn_implementation=attn)
    randomize(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return Tiny(name, model.float().to(DEVICE).eval(), drawers, specs)


@torch.no_grad()
def randomize(model: hf.PreTrainedModel, seed: int = 0, sharp: float = 1.5) -> None:
    """Draw every weight anew: features of unit size everywhere, scores of the text decoder well spread."""
    rng = torch.Generator().manual_seed(seed)
    decoder = {id(p) for p in model.get_decoder().parameters()}
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=rng).to(weight.device)
        ranking = id(weight) in decoder and ("self_attn.q_" in name or "self_attn.k_" in name)
        if weight.dim() > 1:
            fan_in = weight.shape[-1] if weight.dim() < 4 else weight[0].numel()
            weight.copy_(noise * (sharp if ranking else 1.0) / fan_in**0.5)
        elif name.endswith("bias"):
            weight.copy_(0.1 * noise)
        elif name.endswith("weight"):  # a norm's: near one, or near zero where the family adds the one
            weight.add_(0.1 * noise + (sharp - 1 if ranking else 0.0))
        else:  # class and newline embeddings
            weight.copy_(noise)
    head = model.get_output_embeddings().weight
    head[:3] = 0.0  # pad, bos and eos
    head[IMAGE:] = 0.0
