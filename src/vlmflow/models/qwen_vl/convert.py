"""Write a published Qwen-VL as safetensors, with a tokenizer and a chat template that need no code of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vlmflow.models.qwen_vl.processor import answer_settings
from vlmflow.records.files import read_json, write_json

INDEX = "model.safetensors.index.json"


def convert(source: Path, processor: Any, folder: Path) -> int:
    """Write the folder of a published checkpoint anew into another, shard by shard; returns how many shards.

    Weights keep their names and config.json its fields, less the ``auto_map`` to code that does not come along.
    config.json is written last: a folder without it is no checkpoint.

    Raises:
        ValueError: no ``*.bin``.
    """
    shards = sorted(source.glob("*.bin"))
    if not shards:
        raise ValueError(f"{source} holds no weights (*.bin) to convert")
    processor.save_pretrained(folder)
    weight_map, size = {}, 0
    for number, shard in enumerate(shards, 1):
        weights = torch.load(shard, map_location="cpu", weights_only=True)
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({key: weight.contiguous() for key, weight in weights.items()}, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(weights, name)
        size += sum(weight.nbytes for weight in weights.values())
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    answer_settings(processor.tokenizer).save_pretrained(folder)
    settings = read_json(source / "config.json")
    settings.pop("auto_map", None)
    write_json(folder / "config.json", settings)
    return len(shards)
