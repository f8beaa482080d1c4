"""Models of random weights at true widths, and prompts for them: time and memory depend on shapes alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlmflow.core.geometry import Geometry

IMAGE, FIRST_WORD = 3, 10  # the image token; ids below the first word are special
PATCH = 4  # pixels
CONTEXT = 32768  # tokens


def square_side(*image_tokens: int) -> int:
    """Side of the largest square of which each number of image tokens is a whole number: 24 for 576 and 2,880."""
    common = math.gcd(*image_tokens)
    return next(side for side in range(math.isqrt(common), 0, -1) if common % side**2 == 0)


def random_model(
    geometry: Geometry,
    side: int,
    *,
    layers: int | None = None,
    share_weights: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    attn: str = "sdpa",
) -> LlavaForConditionalGeneration:
    """A LLaVA whose decoder has a geometry's widths, and whose vision tower is a stub of side x side tokens an image.

    The decoder is a Llama, whatever the family: the same matrix products; biases, query norms, windows and experts are
    left out. With ``share_weights`` all layers use one set of weights: same arithmetic, a fraction of the memory.
    """
    text = LlamaConfig(
        vocab_size=geometry.vocab,
        hidden_size=geometry.hidden,
        intermediate_size=geometry.intermediate,
        num_hidden_layers=1,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        max_position_embeddings=CONTEXT,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=PATCH * side,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        image_seq_length=side * side,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model: Any = LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attn)
    decoder = model.model.language_model
    first = decoder.layers[0]
    for number in range(1, layers or geometry.layers):
        layer = copy.deepcopy(first, {id(w): w for w in first.parameters()} if share_weights else None)
        layer.self_attn.layer_idx = number
        decoder.layers.append(layer)
    decoder.config.num_hidden_layers = len(decoder.layers)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.eval().requires_grad_(False)


def random_prompt(
    model: LlavaForConditionalGeneration, image_tokens: int, text_tokens: int, batch: int, seed: int = 0
) -> dict[str, Tensor]:
    """Prompts of random images, then random text, as a model's ``generate`` takes them."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(FIRST_WORD, config.text_config.vocab_size, (batch, text_tokens), generator=generator)
    ids = torch.cat([torch.full((batch, image_tokens), IMAGE), words], 1)
    images, side = batch * image_tokens // config.image_seq_length, config.vision_config.image_size
    pixels = torch.randn(images, 3, side, side, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}
