"""The model: a standard LLaVA of five million weights, built from its configuration, saved as a plain folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from recipes.pico.patches import PATCH
from recipes.pico.text import BOS, CHAT_TEMPLATE, EOS, IMAGE, PAD, build_tokenizer
from vlmflow.pico import MODEL_DIR
from vlmflow.pico.scenes import CANVAS

LAYERS = 10
WIDTH = 192
HEADS = 6
MATCHING_LAYERS = 5  # decoder layers born with large keys equal to queries, so that like attends to like
MATCHING_SCALE = 4.4  # times the usual random queries: a token's own word then stands out in the attention at birth


def build_model(canvas: int, seed: int) -> LlavaForConditionalGeneration:
    """A model with random weights for pictures of ``canvas`` pixels, in float32."""
    tokenizer = build_tokenizer()
    pad, bos, eos, image = (tokenizer.get_vocab()[token] for token in (PAD, BOS, EOS, IMAGE))
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=5,
        image_size=canvas,
        patch_size=PATCH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=448,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        tie_word_embeddings=True,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image,
        image_seq_length=(canvas // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).float()
    for layer in model.model.language_model.layers[:MATCHING_LAYERS]:
        layer.self_attn.q_proj.weight.data.mul_(MATCHING_SCALE)
        layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight.data)
    return model


def build_processor(canvas: int = CANVAS) -> LlavaProcessor:
    """The processor: any picture becomes canvas x canvas pixels in [-1, 1]; the prompt gets its image tokens."""
    side = {"height": canvas, "width": canvas}
    image_processor = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor,
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def resize_positions(weights: dict[str, torch.Tensor], canvas: int) -> dict[str, torch.Tensor]:
    """The same weights for another canvas: the tower's position table is interpolated, the class token kept."""
    (name,) = (name for name in weights if name.endswith("position_embedding.weight"))
    table = weights[name]
    old, new = round((len(table) - 1) ** 0.5), canvas // PATCH
    if old == new:
        return weights
    grid = table[1:].T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)[0].flatten(1).T
    return weights | {name: torch.cat([table[:1], grid])}


def save_folder(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write a model as a plain folder: half precision on disk, float32 once loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    build_processor().save_pretrained(folder)
    half = LlavaForConditionalGeneration(model.config).half()
    half.load_state_dict(model.state_dict())
    half.generation_config.max_new_tokens = 32
    half.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = "float32"  # CPUs without half-precision units are thirty times slower in it
    for part in ("text_config", "vision_config"):
        config[part].pop("dtype", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def checksum(folder: Path = MODEL_DIR) -> str:
    """SHA-256 of the weights of a model folder; the model card of ours records what it should be."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
