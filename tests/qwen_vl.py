"""Qwen-VL-Chat as it was published, only tiny: a flat config, shards of pickled weights, a vocabulary of ranks."""

from __future__ import annotations

import base64
import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

import tiny
from vlmflow.models.qwen_vl import QwenVLConfig, register

RANKS = [*(bytes([byte]) for byte in range(256)), b"Wh", b"at", b" c", b"ol", b"What", b" col", b"or", b" color"]
SPECIAL = 217  # tokens after the ranks
WIDTH = 128  # the resampler's heads are as wide
CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "hidden_size": WIDTH,
    "intermediate_size": 2 * 96,
    "kv_channels": 32,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": 2048,
    "torch_dtype": "float32",
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "visual": {
        "heads": 2,
        "image_size": 128,
        "image_start_id": len(RANKS) + SPECIAL - 3,
        "layers": 1,
        "mlp_ratio": 2.0,
        "output_dim": WIDTH,
        "patch_size": 4,
        "width": 32,
    },
    "vocab_size": len(RANKS) + SPECIAL,
}
NAMES = {  # ours -> as published
    "model.visual.": "transformer.visual.",
    "model.language_model.embed_tokens.": "transformer.wte.",
    "model.language_model.norm.": "transformer.ln_f.",
    "model.language_model.layers.": "transformer.h.",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.w1",
    "mlp.gate_proj": "mlp.w2",
    "mlp.down_proj": "mlp.c_proj",
}


def write(folder: Path) -> Path:
    """Write the folder that a download would be; what it answers can be printed, and does not end by chance."""
    folder.mkdir(exist_ok=True)
    register()
    with torch.random.fork_rng():
        model = AutoModelForImageTextToText.from_config(QwenVLConfig(**CONFIG))
    tiny.randomize(model)
    with torch.no_grad():
        for others in (slice(0, 32), slice(127, 256), slice(len(RANKS), None)):
            model.lm_head.weight[others] = 0.0
    files = {
        "config.json": CONFIG,
        "generation_config.json": {
            "chat_format": "chatml",
            "eos_token_id": len(RANKS),
            "do_sample": True,
            "top_p": 0.5,
        },
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
            "tokenizer_class": "QWenTokenizer",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(RANKS))
    (folder / "qwen.tiktoken").write_text("".join(lines))
    write_shards(published(model.state_dict()), folder)
    return folder


def published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the published names, q, k and v in one."""
    renamed = {}
    for key, weight in weights.items():
        for ours, theirs in NAMES.items():
            key = key.replace(ours, theirs)
        renamed[key] = weight
    for key in [key for key in renamed if "self_attn.q_proj" in key]:
        parts = [renamed.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        renamed[key.replace("self_attn.q_proj", "attn.c_attn")] = torch.cat(parts)
    return renamed


def write_shards(weights: dict[str, Tensor], folder: Path) -> None:
    """Two pickled shards and their index."""
    rest, half, index = iter(weights.items()), (len(weights) + 1) // 2, {}
    for number in (1, 2):
        shard, name = dict(islice(rest, half)), f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({key: weight.clone() for key, weight in shard.items()}, folder / name)
        index |= dict.fromkeys(shard, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
