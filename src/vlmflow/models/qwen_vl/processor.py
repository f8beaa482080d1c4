"""Qwen-VL's processor, made of the published ``qwen.tiktoken``: LLaVA's, with ChatML and CLIP's pixels."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, LlavaProcessor, Qwen2Tokenizer
from transformers.utils.hub import cached_file

from vlmflow.models.processors import ProcessorError
from vlmflow.models.qwen_vl.config import QwenVLConfig

try:  # Pillow's resizing, which the model was trained on; torchvision's differs
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Pixels
except ImportError:  # as it is called in transformers 5.0
    from transformers.models.clip.image_processing_clip import CLIPImageProcessor as Pixels

END, IMAGE = "<|endoftext|>", "<imgpad>"
SPECIAL = (  # after the ranks, in this order
    *(END, "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{i}|>" for i in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", IMAGE),
)
CHAT = """\
{%- set pictures = namespace(n=0) -%}
{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if not loop.first -%}{{ '\n' }}{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set pictures.n = pictures.n + 1 -%}{{ 'Picture ' ~ pictures.n ~ ': <img><imgpad></img>\n' }}
{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}{%- endif -%}{{ '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\n<|im_start|>assistant\n' }}{%- endif -%}"""


def published_processor(path: str, settings: Mapping[str, Any], at: Mapping[str, Any]) -> LlavaProcessor:
    """The processor of a checkpoint in the published layout, whose config.json says ``settings``.

    Raises:
        OSError: there is no ``qwen.tiktoken``.
        ProcessorError: it is broken.
    """
    config = QwenVLConfig(**settings)
    file = cached_file(path, "qwen.tiktoken", **at)
    assert file is not None
    vocabulary, merges = read_tiktoken(Path(file))
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,  # pyright: ignore[reportArgumentType] (pairs, as both ends of 5.0 to 5.23 read them)
        model_max_length=config.text_config.max_position_embeddings,
        padding_side="left",
        additional_special_tokens=list(SPECIAL[1:]),
    )
    side = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
    pixels = Pixels(
        do_center_crop=False,
        size=side,
        crop_size=side,
        resample=3,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )
    return LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=side["height"] // math.isqrt(config.vision_config.num_queries),  # that one image token stands for
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        chat_template=CHAT,
    )


def answer_settings(tokenizer: Any) -> GenerationConfig:
    """Greedy, with three ends of an answer: the published generation_config.json samples, and knows the first only."""
    ends = tokenizer.convert_tokens_to_ids([END, "<|im_end|>", "<|im_start|>"])
    return GenerationConfig(eos_token_id=ends, pad_token_id=ends[0])


def read_tiktoken(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges of a ``*.tiktoken`` file, as a byte-level BPE wants them.

    Raises:
        ProcessorError: a line that is no token with its rank, or a token that cannot be merged.
    """
    lines = [line.split() for line in file.read_bytes().splitlines() if line]
    try:
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    except ValueError as error:
        raise ProcessorError(f"{file.name} is broken ({error}); get the checkpoint again") from error
    text = {token: "".join(_LETTERS[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        if len(token) > 1:
            left, right = _last_merge(token, rank, ranks)
            merges.append((text[left], text[right]))
    return {text[token]: rank for token, rank in ranks.items()}, merges


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that a token is made of: what merging by rank leaves before its own merge."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts)))
        if best >= rank:
            raise ProcessorError(f"qwen.tiktoken is broken: no lower ranks make {token!r}; get the checkpoint again")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _letters() -> dict[int, str]:
    """Every byte as a character that can be printed, in GPT-2's alphabet."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


_LETTERS = _letters()
