"""Qwen-VL's model: its own vision tower and resampler before the stock Qwen2 decoder, joined as LLaVA's are."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModel, LlavaForConditionalGeneration, LlavaModel
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmflow.models.qwen_vl.config import QwenVLConfig, QwenVLVisionConfig

_LAYER, _OURS = r"^transformer.h.(\d+)", r"model.language_model.layers.\1"
CONVERSIONS = [  # from the published names to ours
    WeightRenaming(r"^transformer.visual.", "model.visual."),
    WeightRenaming(r"^transformer.wte.", "model.language_model.embed_tokens."),
    WeightRenaming(r"^transformer.ln_f.", "model.language_model.norm."),
    WeightRenaming(rf"{_LAYER}.ln_1.", rf"{_OURS}.input_layernorm."),
    WeightRenaming(rf"{_LAYER}.ln_2.", rf"{_OURS}.post_attention_layernorm."),
    WeightRenaming(rf"{_LAYER}.attn.c_proj.", rf"{_OURS}.self_attn.o_proj."),
    WeightRenaming(rf"{_LAYER}.attn.c_attn.", rf"{_OURS}.self_attn.c_attn."),
    WeightRenaming(rf"{_LAYER}.mlp.w1.", rf"{_OURS}.mlp.up_proj."),
    WeightRenaming(rf"{_LAYER}.mlp.w2.", rf"{_OURS}.mlp.gate_proj."),
    WeightRenaming(rf"{_LAYER}.mlp.c_proj.", rf"{_OURS}.mlp.down_proj."),
    *(
        WeightConverter(
            [f"self_attn.c_attn.{kind}"],
            [f"self_attn.{part}_proj.{kind}" for part in "qkv"],
            operations=[Chunk(dim=0)],
        )
        for kind in ("weight", "bias")
    ),
]


def _resized(table: Float[Tensor, "old width"], length: int) -> Float[Tensor, "new width"]:
    """A square of positions, enlarged to a square of another length."""
    if len(table) == length:
        return table
    old, new = math.isqrt(len(table)), math.isqrt(length)
    square = table.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, (new, new), mode="bicubic", align_corners=False)
    return square.flatten(2).transpose(1, 2)[0].to(table.dtype)


class _Attention(nn.Module):
    """Self-attention whose fused projection holds q, k and v of head 0, then those of head 1, ..."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.in_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, dim=-1)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class _Block(nn.Module):
    def __init__(self, config: QwenVLVisionConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.ln_1 = nn.LayerNorm(width, eps)
        self.attn = _Attention(width, config.num_attention_heads)
        self.ln_2 = nn.LayerNorm(width, eps)
        self.mlp = _MLP(width, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class _Encoder(nn.Module):
    def __init__(self, config: QwenVLVisionConfig):
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))


class _Resampler(nn.Module):
    """Learned queries that attend once to all patches: positions go to queries and keys, not to values."""

    def __init__(self, config: QwenVLVisionConfig):
        super().__init__()
        width, eps = config.output_dim, config.layer_norm_eps
        self.pos_embed = nn.Parameter(torch.zeros(config.num_queries, width), requires_grad=False)
        self.query = nn.Parameter(torch.zeros(config.num_queries, width))
        self.kv_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.attn = nn.MultiheadAttention(width, config.pooling_heads, batch_first=True)
        self.ln_q = nn.LayerNorm(width, eps)
        self.ln_kv = nn.LayerNorm(width, eps)

    def forward(self, patches: Float[Tensor, "pictures patches hidden"]) -> Float[Tensor, "pictures queries width"]:
        values = self.ln_kv(self.kv_proj(patches))
        keys = values + _resized(self.pos_embed, values.shape[1])
        queries = (self.ln_q(self.query) + self.pos_embed).expand(len(values), -1, -1)
        return self.attn(queries, keys, values, need_weights=False)[0]


class QwenVLVisionTower(nn.Module):
    """A ViT without class token or last norm, the resampler, and a projection."""

    def __init__(self, config: QwenVLVisionConfig):
        super().__init__()
        width, out, patch = config.hidden_size, config.output_dim, config.patch_size
        self.conv1 = nn.Conv2d(config.num_channels, width, patch, patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(config.num_queries, width))  # enlarged to the patches
        self.ln_pre = nn.LayerNorm(width, config.layer_norm_eps)
        self.transformer = _Encoder(config)
        self.attn_pool = _Resampler(config)
        self.ln_post = nn.LayerNorm(out, config.layer_norm_eps)
        self.proj = nn.Parameter(torch.zeros(out, out))

    def forward(self, pixels: Float[Tensor, "pictures 3 side side"]) -> Float[Tensor, "pictures queries width"]:
        """The embeddings of the image tokens of each picture."""
        x = self.conv1(pixels.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        x = self.ln_pre(x + _resized(self.positional_embedding, x.shape[1]))
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(self.attn_pool(x)) @ self.proj


class QwenVLModel(LlavaModel):
    """LLaVA's model with this vision tower."""

    config_class = QwenVLConfig
    _checkpoint_conversion_mapping: ClassVar[dict[str, str]] = {}  # LLaVA's own would be inherited by transformers 5.0

    def __init__(self, config: Any):
        super(LlavaModel, self).__init__(config)
        self.visual = QwenVLVisionTower(config.vision_config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.trained_length = config.text_config.max_position_embeddings
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, *_: Any, **__: Any) -> Any:
        """The embeddings of each picture, as ``pooler_output``, a list as LLaVA's."""
        embeddings: Any = list(self.visual(pixel_values))
        return BaseModelOutputWithPooling(pooler_output=embeddings)

    def forward(self, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As LLaVA's; a ``ValueError`` for a prompt above the trained length.

        There the published code stretches its rotary base and scales its queries, which this decoder does not.
        """
        length = (kwargs["inputs_embeds"] if input_ids is None else input_ids).shape[1]
        if length > self.trained_length:
            raise ValueError(
                f"Qwen-VL was trained on {self.trained_length} tokens, and this prompt has {length}; ask less"
            )
        return super().forward(input_ids, *args, **kwargs)


class QwenVLForConditionalGeneration(LlavaForConditionalGeneration):
    """Qwen-VL and Qwen-VL-Chat."""

    config_class = QwenVLConfig
    _checkpoint_conversion_mapping: ClassVar[dict[str, str]] = {}
    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    def __init__(self, config: Any):
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = QwenVLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
