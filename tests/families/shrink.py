"""Every image-text-to-text type of the installed transformers as a model of six layers, from its own default config.

``tiny_config(name)`` takes a type's default config and makes it small by rules: sizes by the names that configs give
them, one table for text decoders and one for towers. What no rule makes fit stands in ``EXCEPTIONS``. A name is a
``model_type``, or ``model_type@variant`` for another text decoder or pattern of layers, which stands there too.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import transformers as hf
from exceptions import EXCEPTIONS
from packaging.version import Version
from torch import nn
from transformers.models.auto import modeling_auto as auto

import tiny
from tiny import IMAGE, VIDEO
from vlmflow.models import qwen_vl

OURS = {"qwen": "QwenVLForConditionalGeneration"}  # which transformers does not have
LAYERS, VOCAB, OTHER = 6, 160, 110  # OTHER stands for every special token that no test looks at

TEXT = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "n_embd", "block_dim", "conv_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "block_ff_dim", "shared_intermediate_size"), 128),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size"), 128),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers"), LAYERS),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "sliding_window", "attention_chunk_size", "index_topk"), 512),
    **dict.fromkeys(("head_dim", "global_head_dim", "swa_head_dim", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "index_head_dim", "mamba_head_dim", "ssm_state_size"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_latent_size"), 32),
    **dict.fromkeys(("moe_num_shared_experts", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("n_group", "topk_group", "mamba_n_groups"), 1),
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
}
TOWER = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "projection_dim", "audio_embed_dim", "image_size"), 32),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("num_position_embeddings", "max_position_embeddings"), 64),
    **dict.fromkeys(("out_hidden_size", "output_dim", "text_hidden_size", "merger_hidden_size"), 64),  # the decoder's
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "patch_size"), 4),
    "head_dim": 8,
    "window_size": 16,
    "num_global_layers": 1,
    "vocab_size": VOCAB,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0],
}
TOWERS = (
    *("vis", "vit", "encoder", "audio", "qformer", "perceiver", "resampler", "backbone", "sam", "high_res", "vq"),
    *("image_", "clip", "siglip", "projector", "tower", "code2wav", "talker", "token2wav"),
)
TOKENS = {
    **dict.fromkeys(("image_token_id", "image_token_index"), IMAGE),
    **dict.fromkeys(("video_token_id", "video_token_index"), VIDEO),
    **dict.fromkeys(("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index"), tiny.START),
    **dict.fromkeys(("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index"), tiny.END),
    "pad_token_id": tiny.PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NOTES = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
KINDS = ("layer_types", "mlp_layer_types")  # a word a layer
ROPE = ("rope_parameters", "rope_scaling")
# Before, their default configs did not build, eager attention gave no weights, a part could not be switched to sdpa,
# image features had another form, or hybrids had caches of their own; Ministral 3 took slots for positions.
SINCE = {
    **dict.fromkeys(
        ("fuyu", "gemma3n", "lfm2_vl", "phi4_multimodal", "pix2struct", "pixtral", "qwen3_omni_moe"), "5.12"
    ),
    **dict.fromkeys(("blip-2", "diffusion_gemma", "fast_vlm", "gemma4_unified", "granite4_vision"), "5.23"),
    **dict.fromkeys(("instructblip", "instructblipvideo", "llama4", "minimax_m3_vl"), "5.23"),
    "vision-encoder-decoder": "5.23",
    **dict.fromkeys(("mistral3@ministral3", "qwen3_5", "qwen3_5_moe"), "5.12"),
}


def is_installed(name: str) -> bool:
    """Whether this transformers has a type, in a form that can be tested."""
    kind = name.partition("@")[0]
    return kind in types() and Version(hf.__version__) >= Version(SINCE.get(name, SINCE.get(kind, "5.0")))


def types() -> dict[str, str]:
    """The class of every image-text-to-text type, and of the multimodal ones beside them that take images."""
    beside = ("phi4_multimodal", "qwen2_5_omni", "qwen3_omni_moe")
    more = {name: kind for name, kind in auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.items() if name in beside}
    return {**auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **more, **OURS}


def build(name: str) -> hf.PreTrainedModel:
    """The model of six layers, in eager mode; its weights are what transformers draws."""
    with torch.random.fork_rng(), mock.patch.object(hf.AutoModel, "from_config", _without_timm):
        kind = getattr(qwen_vl if name in OURS else hf, types()[name.partition("@")[0]])
        return kind._from_config(tiny_config(name), attn_implementation="eager")


def _without_timm(config: hf.PreTrainedConfig, *args: Any, _from=hf.AutoModel.from_config, **kwargs: Any) -> nn.Module:
    """Towers of timm, which is not installed, are never called: ``inputs.STOOD_IN`` names their models."""
    if type(config).__name__ in ("TimmWrapperConfig", "Gemma3nVisionConfig"):
        return nn.Identity()
    return _from(config, *args, **kwargs)


def tiny_config(name: str) -> hf.PreTrainedConfig:
    """The default config of a type, made small."""
    qwen_vl.register()
    kind = hf.CONFIG_MAPPING[name.partition("@")[0]]
    config = shrink(kind().to_dict())
    config.pop("model_type")
    for path, value in EXCEPTIONS.get(name, {}).items():
        *parents, last = path.split(".")
        part = config
        for parent in parents:
            part = part[parent]
        part[last] = value
    return kind(**config)


def shrink(config: dict, path: tuple[str, ...] = ()) -> dict:
    """What a config says, with every size that a rule knows made small; ``path`` leads to it from the whole config."""
    tower = any(word in part for part in path for word in TOWERS)
    left_out = (*NOTES, *KINDS) if tower else NOTES
    return {name: small(name, value, config, path) for name, value in config.items() if name not in left_out}


def small(name: Any, value: Any, config: dict, path: tuple[str, ...]) -> Any:
    """One field of a config."""
    tower = any(word in part for part in path for word in TOWERS)
    sizes = TOWER if tower else TEXT
    if name in ROPE:
        return rope(value, 8 if tower or config.get("qk_rope_head_dim") else 16)
    if name == "per_layer_config":
        return {layer: shrink(sub, path) for layer, sub in (value or {}).items() if int(layer) < LAYERS}
    if isinstance(value, dict) and name not in ("id2label", "label2id", "vocabulary_map"):
        return shrink(value, (*path, name)) if all(isinstance(key, str) for key in value) else value
    if isinstance(name, str) and name.endswith(("token_id", "token_index")):
        return value if value is None and name != "pad_token_id" else TOKENS.get(name, OTHER)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (list, tuple)):
        return small_list(name, value, config, sizes)
    if name == "num_key_value_heads" and not tower:
        return 4 if value == config.get("num_attention_heads") else 2
    if name == "num_global_key_value_heads":
        return 1
    return sizes.get(name, value)


def small_list(name: str, values: list, config: dict, sizes: dict) -> list:
    """A value a layer or an axis."""
    if isinstance(sizes.get(name), list):
        return sizes[name]
    if sizes is TOWER:
        return [sizes[name]] * len(values) if name in ("patch_size", "image_size") else values
    layers = config.get("num_hidden_layers") or config.get("num_layers")
    if name in KINDS or len(values) == layers:
        values = values[:LAYERS]
    return [sizes[name]] * len(values) if name in ("intermediate_size", "moe_intermediate_size") else values


def rope(settings: Any, head: int) -> Any:
    """Rotary settings for heads of this width, without scaling; there may be some for each kind of layer."""
    if not isinstance(settings, dict):
        return settings
    if settings and all(isinstance(value, dict) for value in settings.values()):
        return {kind: rope(value, head) for kind, value in settings.items()}
    kept = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
    settings = {
        **{name: value for name, value in settings.items() if name in kept},
        "rope_type": "proportional" if settings.get("rope_type") == "proportional" else "default",
    }
    if section := settings.get("mrope_section"):
        pairs = int(head * (settings.get("partial_rotary_factor") or 1)) // 2
        rest = [max(1, part * pairs // sum(section)) for part in section[1:]]
        settings["mrope_section"] = [pairs - sum(rest), *rest]
    return settings
