"""Qwen-VL's widths, as its flat config.json tells them or in two parts."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig, Qwen2Config

FIXED = {"rotary_pct": 1.0, "no_bias": True, "scale_attn_weights": True}  # of every published model


class QwenVLVisionConfig(PreTrainedConfig):
    """The vision tower with its resampler, whose ``num_queries`` make that many image tokens of a picture."""

    model_type = "qwen_vl_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = 1664,
        intermediate_size: int = 8192,
        num_hidden_layers: int = 48,
        num_attention_heads: int = 16,
        image_size: int = 448,
        patch_size: int = 14,
        num_channels: int = 3,
        num_queries: int = 256,
        output_dim: int = 4096,
        pooling_heads: int = 32,
        layer_norm_eps: float = 1e-6,
        **kwargs: Any,
    ):
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.num_queries = num_queries
        self.output_dim = output_dim
        self.pooling_heads = pooling_heads
        self.layer_norm_eps = layer_norm_eps
        super().__init__(**kwargs)


class QwenVLConfig(PreTrainedConfig):
    """Read from the published, flat config.json, which has a ``visual``, or from its two parts.

    Raises:
        ValueError: text-only Qwen, which has the same ``model_type``, or a setting that no published model has.
    """

    model_type = "qwen"
    sub_configs: ClassVar[Any] = {
        "text_config": Qwen2Config,
        "vision_config": QwenVLVisionConfig,
    }

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        visual: dict[str, Any] | None = None,
        image_token_id: int = 151859,
        **kwargs: Any,
    ):
        if visual is not None:
            text_config, vision_config = _published_text(kwargs), _published_vision(visual)
            image_token_id = visual["image_start_id"] + 2
        elif text_config is None and "kv_channels" in kwargs:
            raise ValueError("it is Qwen of 2023 without images; of that type only Qwen-VL and Qwen-VL-Chat are known")
        self.text_config = _made(text_config, Qwen2Config)
        self.vision_config = _made(vision_config, QwenVLVisionConfig)
        self.image_token_id = image_token_id
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


def _published_text(fields: dict[str, Any]) -> Qwen2Config:
    """The text decoder of a flat config: Qwen2's, without grouped queries. Takes what it reads out of ``fields``."""
    other = [name for name, value in FIXED.items() if fields.get(name, value) != value]
    if other:
        raise ValueError(f"its config.json has another {' and '.join(other)} than any published Qwen-VL")
    heads = fields.pop("num_attention_heads")
    return Qwen2Config(
        vocab_size=fields.pop("vocab_size"),
        hidden_size=fields.pop("hidden_size"),
        intermediate_size=fields.pop("intermediate_size") // 2,  # the field is twice the width of the MLP
        num_hidden_layers=fields.pop("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rms_norm_eps=fields.pop("layer_norm_epsilon"),
        max_position_embeddings=fields.pop("seq_length"),  # above, dynamic NTK and logn make it another model
        rope_parameters={"rope_type": "default", "rope_theta": float(fields.pop("rotary_emb_base"))},
        use_sliding_window=False,
        tie_word_embeddings=False,
    )


def _published_vision(visual: dict[str, Any]) -> QwenVLVisionConfig:
    return QwenVLVisionConfig(
        hidden_size=visual["width"],
        intermediate_size=int(visual["width"] * visual["mlp_ratio"]),
        num_hidden_layers=visual["layers"],
        num_attention_heads=visual["heads"],
        image_size=visual["image_size"],
        patch_size=visual["patch_size"],
        output_dim=visual["output_dim"],
        pooling_heads=visual["output_dim"] // 128,
    )


def _made(config: Any, kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    return config if isinstance(config, PreTrainedConfig) else kind(**(config or {}))
