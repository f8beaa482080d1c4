"""What the rules of ``shrink.py`` do not make fit, type by type: fields by their paths, and what they become."""

from __future__ import annotations

from typing import Any

import tiny
from tiny import IMAGE

ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {**ROPE, "mrope_section": [2, 3, 3]}
INTERLEAVED = {**ROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
HALF = {**ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
SLIDING = ["sliding_attention", "full_attention"] * 3
TWO_KINDS = ["sliding_attention", "sliding_attention", "full_attention"] * 2
INKLING = ["hybrid_sliding", "hybrid_sliding", "hybrid"] * 2
CODES = range(112, 144)  # the ids of images that are tokens of the vocabulary

DECODER = {**tiny.TEXT, "vocab_size": 160, "num_hidden_layers": 6, "rope_parameters": ROPE}
EXPERTS = {**tiny.HEAD, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 32.0, "beta_slow": 1.0}


def under(parent: str, **fields: Any) -> dict[str, Any]:
    """Fields of one part of a config, by their paths."""
    return {f"{parent}.{name}": value for name, value in fields.items()}


GEMMA4 = {
    "vision_config": {
        **tiny.VISION,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "patch_size": 4,
        "pooling_kernel_size": 3,
        "position_embedding_size": 64,
    },
    "audio_config": None,
    **under("text_config", num_kv_shared_layers=0, per_layer_config={"05": {"head_dim": 32}}),
}
SHARED = {
    **GEMMA4,
    **under(
        "text_config",
        num_kv_shared_layers=2,
        layer_types=TWO_KINDS,
        per_layer_config={"02": {"head_dim": 32}, "05": {"head_dim": 32}},
    ),
}
GEMMA4_WINDOW = {"text_config.sliding_window": 14}
OMNI = {"enable_audio_output": False, **under("thinker_config", vision_start_token_id=102, vision_end_token_id=103)}
RECURRENT = {"text_config.layer_types": ["linear_attention", "full_attention"] * 3}
MINIMAX_SPARSE = ["full_attention", *["minimax_m3_sparse"] * 3, "full_attention", "minimax_m3_sparse"]
QFORMER = {"hidden_size": 64, "encoder_hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {64: 16}, "max_value_projector_patch_to_query_dict": 16},
    "blip-2": {"image_token_index": IMAGE, "text_config.word_embed_proj_dim": 64},
    "chameleon": {
        "image_token_id": IMAGE,
        "vocabulary_map": {
            "<image>": IMAGE,
            **{f"IMGIMG{''.join(chr(65 + int(digit)) for digit in f'{n:02}')}Z": code for n, code in enumerate(CODES)},
        },
        **under(
            "vq_config",
            base_channels=32,
            num_embeddings=32,
            embed_dim=16,
            latent_channels=16,
            resolution=32,
            channel_multiplier=[1, 2, 2],
            num_res_blocks=1,
        ),
    },
    "cohere2_vision": {"alignment_intermediate_size": 128},
    "cohere_compass": {
        **under(
            "text_config",
            layer_types=SLIDING,
            rope_parameters={"sliding_attention": INTERLEAVED, "full_attention": INTERLEAVED},
        ),
        **under("vision_config", depth=4, deepstack_visual_indexes=[0, 1, 2]),
    },
    "deepseek_ocr2": {
        **under("text_config", mlp_layer_types=["dense", *["sparse"] * 5], num_experts_per_tok=2, n_routed_experts=4),
        **under(
            "vision_config.encoder_config", hidden_size=64, num_hidden_layers=2, layer_types=["full_attention"] * 2
        ),
        **under(
            "vision_config.sam_config",
            downsample_channels=[32, 64],
            global_attn_indexes=[1],
            scale=32,
            output_channels=16,
            window_size=4,
        ),
    },
    "deepseek_vl_hybrid": under("high_res_vision_config", global_attn_indexes=[0, 1], output_channels=16),
    "diffusion_gemma": under("text_config", num_experts=4, top_k_experts=2, moe_intermediate_size=32),
    "dots3_note": {
        **under("text_config", per_layer_config={}, head_dim=24),
        **under("vision_config", adapter_in_dim=32, adapter_out_dim=64),
        **under("audio_config", adapter_out_dim=64, adapter_input_size=32, head_dim=None),
    },
    "emu3": {
        "image_token_id": IMAGE,
        "vocabulary_map": {
            "<image>": IMAGE,
            "<|extra_200|>": 110,
            **{f"<|visual token {n:06}|>": code for n, code in enumerate(CODES)},
        },
        **under(
            "vq_config",
            codebook_size=32,
            base_channels=32,
            channel_multiplier=[1, 2, 2],
            attn_resolutions=[],
            num_res_blocks=1,
            hidden_size=64,
            temporal_downsample_factor=1,
            embed_dim=4,
            latent_channels=4,
        ),
    },
    "ernie4_5_vl_moe": under(
        "text_config",
        moe_intermediate_size=[32, 16],
        rope_parameters={**ROPE, "mrope_section": [3, 3, 2]},
        use_bias=False,
    ),
    "gemma3": {"mm_tokens_per_image": 16},
    "gemma3n": {
        **under(
            "text_config",
            num_kv_shared_layers=2,
            activation_sparsity_pattern=[0.0] * 6,
            intermediate_size=[128] * 6,
            layer_types=TWO_KINDS,
        ),
        **under("vision_config", vocab_size=16, vocab_offset=120, hidden_size=64),
        **under("audio_config", vocab_size=8, vocab_offset=140, hidden_size=64, conf_num_hidden_layers=1),
        "audio_config.conf_num_attention_heads": 4,
    },
    "gemma4": GEMMA4,
    "gemma4@bidirectional": {**GEMMA4, "text_config.use_bidirectional_attention": "vision"},
    "gemma4@shared": SHARED,
    "gemma4@shared_window": {**SHARED, **GEMMA4_WINDOW},
    "gemma4@window": {**GEMMA4, **GEMMA4_WINDOW},
    "gemma4_unified": {
        **{key: value for key, value in GEMMA4.items() if key != "text_config.num_kv_shared_layers"},
        "vision_config": {
            "patch_size": 4,
            "pooling_kernel_size": 3,
            "mm_embed_dim": 32,
            "mm_posemb_size": 64,
            "output_proj_dims": 32,
        },
    },
    **{
        name: {"text_config.rope_parameters": HALF, "text_config.pad_token_id": 0}
        for name in ("glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga")
    },
    "glm5_next": under(
        "text_config",
        qk_rope_head_dim=0,
        head_dim=0,
        qk_head_dim=16,
        linear_head_dim=16,
        linear_num_heads=4,
        index_kpool=1,
        hc_mult=2,
    ),
    "granite4_vision": {
        "downsample_rate": "1/2",
        "spatial_target_layers": [1, 2],
        "deepstack_layer_map": [[-1, 0]],
        "image_grid_pinpoints": [[32, 32]],
        **under("qformer_config", **QFORMER, num_attention_heads=4),
        **under("vision_config", hidden_size=64, intermediate_size=64),
    },
    "hunyuan_vl": under("text_config", rope_parameters={**ROPE, "mrope_section": [2, 2, 2, 2]}, head_dim=16),
    "inkling2": {
        **under("text_config", swa_num_attention_heads=4, swa_num_key_value_heads=2, unpadded_vocab_size=150, d_rel=4),
        **under("text_config", sliding_window_size=512, rel_extent=64, n_layers_per_attn_res_block=2),
        "text_config.layer_types": INKLING,
        "vision_config.text_hidden_size": 64,
    },
    "inkling_mm_model": {
        **under("text_config", swa_num_attention_heads=4, swa_num_key_value_heads=2, d_rel=4, layer_types=INKLING),
        **under("text_config", sliding_window_size=512, rel_extent=64, intermediate_size=128),
        **under("vision_config", text_hidden_size=64, hidden_size=32),
    },
    "instructblip": {"image_token_index": IMAGE, "text_config.word_embed_proj_dim": 64},
    "instructblipvideo": {"video_token_index": IMAGE, "text_config.word_embed_proj_dim": 64},
    "internvl@gpt_oss": {
        "text_config": {**DECODER, "model_type": "gpt_oss", "num_local_experts": 4, "layer_types": SLIDING, **EXPERTS}
    },
    "internvl@qwen3_moe": {"text_config": {**DECODER, "model_type": "qwen3_moe", "num_experts": 4, **EXPERTS}},
    "janus": {
        "vision_config.projection_dim": 64,
        **under("vq_config", base_channels=32, channel_multiplier=[1, 2], num_res_blocks=1),
    },
    "muse_glimmer": {"projector_hidden_size": 64},
    "kimi_k25": {"text_config.head_dim": 8},
    "lfm2_vl": {
        **under("text_config", layer_types=["conv", "full_attention"] * 3, full_attn_idxs=None),
        "text_config.block_auto_adjust_ff_dim": False,
        "vision_config.num_patches": 64,
    },
    "lfm3_vl": {
        "text_config.layer_types": ["conv", "full_attention", "conv", "sliding_attention", "conv", "full_attention"]
    },
    "llama4": {
        **under("vision_config", intermediate_size=128, projector_input_dim=64, projector_output_dim=64),
        "vision_config.vision_output_dim": 64,
    },
    "llava@phi3": {
        "text_config": {**{key: value for key, value in DECODER.items() if key != "head_dim"}, "model_type": "phi3"}
    },
    **{name: {"image_grid_pinpoints": [[32, 32]]} for name in ("llava_next", "llava_next_video", "llava_onevision")},
    **{name: {"image_token_id": IMAGE, **RECURRENT} for name in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")},
    "minimax_m3_vl@sparse": under(
        "text_config", layer_types=MINIMAX_SPARSE, index_block_size=4, index_topk_blocks=4, index_local_blocks=1
    ),
    "mistral3@ministral3": {
        "text_config": {
            **DECODER,
            **tiny.HEAD,
            "model_type": "ministral3",
            "rope_parameters": {**ROPE, **YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5},
        }
    },
    "molmo2": {
        "image_patch_id": IMAGE,
        **under("adapter_config", vision_feature_layer=[1, 0], hidden_size=32, num_attention_heads=4, head_dim=8),
        **under("adapter_config", num_key_value_heads=4, intermediate_size=64, text_hidden_size=64),
        **under("vision_config", image_size=[32, 32], num_position_embeddings=64, head_dim=8),
        "text_config.additional_vocab_size": 16,
    },
    "muse_spark": {
        "out_hidden_size": 64,
        "projector_hidden_size": 64,
        **under("vision_config", layer_types=["window_attention", "full_attention"], pos_emb_height=8, pos_emb_width=8),
        **under(
            "audio_config", num_hidden_layers=1, patch_sizes=[4], hidden_sizes=[32], depths=[1], out_hidden_size=64
        ),
        **under("text_config", moe_hidden_size=32, layer_rope_theta=[5e5, 0, 5e5, 5e5, 5e5, 0]),
    },
    "nemotron_h_omni": {
        "image_token_id": IMAGE,
        "vision_hidden_size": 32,
        "projector_hidden_size": 64,
        "text_config.layers_block_type": ["mamba", "attention", "mamba", "attention", "moe", "attention"],
        "text_config.n_groups": 1,
    },
    "paddleocr_vl": {"text_config.rope_parameters": MROPE},
    "paligemma": {"projection_dim": 64, "hidden_size": 64, "vision_config.projection_dim": 64},
    "paligemma@gemma2": {
        "projection_dim": 64,
        "hidden_size": 64,
        "vision_config.projection_dim": 64,
        "text_config": {**DECODER, **tiny.HEAD, "model_type": "gemma2", "query_pre_attn_scalar": 16},
    },
    "perception_lm": {"vision_config.model_args": {"embed_dim": 32}},
    "phi4_multimodal": {"vision_config.crop_size": 32},
    "qwen": {"vision_config.num_queries": 16, "vision_config.pooling_heads": 4},
    "qwen2_5_omni": {**OMNI, "thinker_config.text_config.rope_parameters": MROPE},
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": 102,
        "vision_end_token_id": 103,
        "text_config.rope_parameters": MROPE,
    },
    "qwen2_5_vl": {"text_config.rope_parameters": MROPE},
    "qwen2_vl": {"text_config.rope_parameters": MROPE, "vision_config.hidden_size": 64, "vision_config.embed_dim": 32},
    "qwen3_5": RECURRENT,
    "qwen3_5_moe": RECURRENT,
    "qwen3_omni_moe": {**OMNI, "thinker_config.text_config.rope_parameters": INTERLEAVED},
    "qwen3_omni_moe_thinker": {
        "vision_start_token_id": 102,
        "vision_end_token_id": 103,
        "text_config.rope_parameters": INTERLEAVED,
    },
    "qwen3_vl_moe": {"text_config.pad_token_id": 0},
    "qwen4_exp": {
        **under("text_config", indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=512),
        **under("text_config", indexer_compress_ratio=1, hc_lowrank=8, hc_count=2, ple_embed_dim=64),
        "text_config.rope_parameters": INTERLEAVED,
    },
    "shieldgemma2": {"mm_tokens_per_image": 16},
    "step3p7": {"text_config.sliding_window": 512},
    "t5gemma2": under("encoder.text_config", hidden_size=64, num_hidden_layers=6),
    "vipllava": {"vision_feature_layers": [-1, -2]},
}
