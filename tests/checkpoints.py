"""A complete checkpoint folder for each family: processor, tokenizer, chat template, config and weights.

``write(family, folder)`` writes what a download from the hub would bring, in its form and with its special tokens, only
tiny: the random model of `tiny`, an image processor for pictures of a few patches, and a tokenizer that spells every
text character by character in the 128 ids that `tiny` has. Files are written by hand, since the processors of most
families cannot be made, only loaded, where their video half lacks its packages.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import qwen_vl
import tiny

CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]  # from id 3, after padding, start and end
UNKNOWN = 99
TILE = 32  # the side, in pixels, of a tile of internvl, idefics3 and smolvlm


@dataclass(frozen=True)
class Family:
    """How a family's checkpoints differ from one another's: in their files, not in their weights."""

    tokenizer_class: str
    spelling: str  # "bytes", "llama" or "gemma": how characters are written in the vocabulary
    frame: tuple[str | None, str, str, str | None]  # start, end, padding, unknown
    special: dict[int, str]  # id -> token, from tiny.IMAGE on
    processor_class: str
    image_processor: dict[str, Any]
    processor: dict[str, Any] = field(default_factory=dict)  # of processor_config.json
    named: dict[str, str] = field(default_factory=dict)  # the tokens that the tokenizer knows by name
    template: str | None = None


def write(name: str, folder: Path) -> Path:
    """Write a family's checkpoint into a folder, and return the folder."""
    if name == "qwen":
        return qwen_vl.write(folder)
    family = FAMILIES[name]
    model = tiny.build(name).model
    model.save_pretrained(folder)
    start, end, padding, unknown = family.frame
    tokens = {"bos_token": start, "eos_token": end, "pad_token": padding, "unk_token": unknown}
    files = {
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tiny.PAD},
        "preprocessor_config.json": {**family.image_processor, "processor_class": family.processor_class},
        "tokenizer_config.json": {
            **tokens,
            "add_bos_token": start is not None,
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": family.named,
            "model_max_length": 512,
            "processor_class": family.processor_class,
            "tokenizer_class": family.tokenizer_class,
        },
    }
    if family.processor:
        files["processor_config.json"] = {**family.processor, "processor_class": family.processor_class}
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=2))
    if family.template is not None:
        (folder / "chat_template.jinja").write_text(family.template)
    tokenizer(family).save(str(folder / "tokenizer.json"))
    return folder


def tokenizer(family: Family) -> Tokenizer:
    """A tokenizer of single characters, with the pipeline of the family's own."""
    start, end, padding, unknown = family.frame
    spell = {
        "bytes": {" ": "Ġ", "\n": "Ċ"},  # as bytes are written in GPT-2's alphabet
        "llama": {" ": "▁"},
        "gemma": {" ": "▁"},
    }[family.spelling]
    vocabulary = {spell.get(character, character): i for i, character in enumerate(CHARACTERS, 3)}
    vocabulary |= {padding: 0, end: 2}
    if start is not None:
        vocabulary[start] = 1
    if unknown is not None:
        vocabulary.setdefault(unknown, UNKNOWN)
    vocabulary |= {token: i for i, token in family.special.items() if token not in vocabulary}
    vocabulary |= {f"<unused{i}>": i for i in range(tiny.VOCAB) if i not in vocabulary.values()}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown, fuse_unk=True))
    if family.spelling == "bytes":
        words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        made.decoder = decoders.ByteLevel()
    else:
        made.normalizer = normalizers.Replace(" ", "▁")
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    framing = [token for token in (padding, start, end, unknown) if token is not None]
    special = dict.fromkeys([*framing, *family.special.values()])
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if start is not None:
        made.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, 1)]
        )
    return made


# -- what the image processors have in common

PIXELS = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def idefics_pixels(kind: str) -> dict[str, Any]:
    return {
        **PIXELS,
        "image_processor_type": kind,
        "do_image_splitting": True,
        "do_pad": True,
        "max_image_size": {"longest_edge": TILE},
        "size": {"longest_edge": 2 * TILE},
        "resample": 1,
    }


def qwen_pixels(kind: str, **size: Any) -> dict[str, Any]:
    grid = {"patch_size": tiny.PATCH, "temporal_patch_size": 2, "merge_size": 2}
    return {**PIXELS, **grid, **size, "image_processor_type": kind}


# -- chat templates, in the form of those on the hub

LLAVA_CHAT = """\
{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}\
{# Render all images first #}\
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}\
{# Render all text next #}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}\
{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

MISTRAL_CHAT = """\
{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}\
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}\
{{' [/INST]' }}{% endif %}{% endfor %}"""

ONEVISION_CHAT = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}\
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}\
{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

INTERNVL_CHAT = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}\
{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}\
{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}\
{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"""

IDEFICS_CHAT = """\
{% for message in messages %}{{message['role'].capitalize()}}\
{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}\
{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}\
{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

PIXTRAL_CHAT = """\
{{- bos_token }}{%- for message in messages %}{%- if message['role'] == 'user' %}{{- '[INST]' }}\
{%- if message['content'] is string %}{{- message['content'] }}{%- else %}{%- for block in message['content'] %}\
{%- if block['type'] == 'text' %}{{- block['text'] }}\
{%- elif block['type'] in ['image', 'image_url'] %}{{- '[IMG]' }}\
{%- else %}{{- raise_exception('Only text and image blocks are supported in message content!') }}{%- endif %}\
{%- endfor %}{%- endif %}{{- '[/INST]' }}{%- endif %}{%- endfor %}"""

QWEN_CHAT = """\
{% for message in messages %}\
{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}\
{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}\
<|vision_start|><|image_pad|><|vision_end|>\
{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>\
{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LFM2_CHAT = """\
{{- bos_token -}}{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' -}}\
{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}{%- for item in message['content'] -%}\
{%- if item['type'] == 'image' -%}{{- '<image>' -}}{%- elif item['type'] == 'text' -%}{{- item['text'] -}}{%- endif -%}\
{%- endfor -%}{%- endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}\
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

GLM_CHAT = """\
[gMASK]<sop>
{%- for m in messages %}{%- if m.role == 'user' %}<|user|>
{% if m.content is string %}{{ m.content }}{% else %}{% for item in m.content %}\
{% if item.type == 'video' or 'video' in item %}<|begin_of_video|><|video|><|end_of_video|>\
{% elif item.type == 'image' or 'image' in item %}<|begin_of_image|><|image|><|end_of_image|>\
{% elif item.type == 'text' %}{{ item.text }}{% endif %}{% endfor %}{% endif %}\
{%- endif %}{%- endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""

GEMMA_CHAT = """\
{{ bos_token }}{%- for message in messages -%}\
{%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}{%- else -%}{%- set role = message['role'] -%}\
{%- endif -%}{{ '<start_of_turn>' + role + '\n' }}\
{%- if message['content'] is string -%}{{ message['content'] | trim }}\
{%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}\
{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}\
{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}\
{%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}{{ '<end_of_turn>\n' }}\
{%- endfor -%}{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"""

# -- the families

LLAMA = ("<s>", "</s>", "<pad>", "<unk>")
QWEN = (None, "<|im_end|>", "<|endoftext|>", None)
CHATML = {106: "<|im_start|>"}


def numbered(first: int, *tokens: str) -> dict[int, str]:
    return dict(enumerate(tokens, first))


def rows_and_columns(n: int) -> list[str]:
    return [f"<row_{row}_col_{column}>" for row in range(1, n + 1) for column in range(1, n + 1)]


IDEFICS_TOKENS = {tiny.IMAGE: "<image>"} | numbered(
    102, "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *rows_and_columns(2)
)
QWEN_TOKENS = CHATML | numbered(tiny.IMAGE, "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def qwen(processor_class: str, kind: str = "Qwen2VLImageProcessor", **size: Any) -> Family:
    return Family(
        "Qwen2Tokenizer", "bytes", QWEN, QWEN_TOKENS, processor_class, qwen_pixels(kind, **size), template=QWEN_CHAT
    )


FAMILIES = {
    "llava": Family(
        "LlamaTokenizer",
        "llama",
        LLAMA,
        {tiny.IMAGE: "<image>"},
        "LlavaProcessor",
        {
            **PIXELS,
            "image_processor_type": "CLIPImageProcessor",
            "do_center_crop": True,
            "crop_size": square(30),
            "size": {"shortest_edge": 30},
        },
        {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 6,
            "vision_feature_select_strategy": "default",
        },
        {"image_token": "<image>"},
        LLAVA_CHAT,
    ),
    "llava_next": Family(
        "LlamaTokenizer",
        "llama",
        LLAMA,
        {tiny.IMAGE: "<image>"},
        "LlavaNextProcessor",
        {
            **PIXELS,
            "image_processor_type": "LlavaNextImageProcessor",
            "aspect_ratio_setting": "anyres",
            "do_center_crop": True,
            "do_pad": True,
            "crop_size": square(16),
            "image_grid_pinpoints": tiny.PINPOINTS,
            "size": {"shortest_edge": 16},
        },
        {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 8,
            "vision_feature_select_strategy": "default",
        },
        {"image_token": "<image>"},
        MISTRAL_CHAT,
    ),
    "llava_onevision": Family(
        "Qwen2Tokenizer",
        "bytes",
        QWEN,
        CHATML | numbered(tiny.IMAGE, "<image>", "<video>"),
        "LlavaOnevisionProcessor",
        {
            **PIXELS,
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "do_pad": True,
            "image_grid_pinpoints": tiny.PINPOINTS,
            "size": square(16),
        },
        {
            "image_token": "<image>",
            "num_image_tokens": 4,
            "video_token": "<video>",
            "vision_feature_select_strategy": "full",
        },
        template=ONEVISION_CHAT,
    ),
    "internvl": Family(
        "Qwen2Tokenizer",
        "bytes",
        QWEN,
        CHATML | numbered(tiny.IMAGE, "<IMG_CONTEXT>", "<video>", "<img>", "</img>"),
        "InternVLProcessor",
        {
            **PIXELS,
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "crop_to_patches": False,
            "min_patches": 1,
            "max_patches": 4,
            "size": square(TILE),
        },
        {"image_seq_length": 16},
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        INTERNVL_CHAT,
    ),
    "idefics3": Family(
        "PreTrainedTokenizerFast",
        "bytes",
        ("<|begin_of_text|>", "<|eot_id|>", "<|reserved_special_token_0|>", None),
        IDEFICS_TOKENS,
        "Idefics3Processor",
        idefics_pixels("Idefics3ImageProcessor"),
        {"image_seq_len": 16},
        template="<|begin_of_text|>" + IDEFICS_CHAT,
    ),
    "smolvlm": Family(
        "GPT2Tokenizer",
        "bytes",
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|endoftext|>"),
        IDEFICS_TOKENS,
        "SmolVLMProcessor",
        {
            **idefics_pixels("SmolVLMImageProcessor"),
            "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": TILE}},
        },
        {"image_seq_len": 16},
        {
            "end_of_utterance_token": "<end_of_utterance>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "image_token": "<image>",
        },
        "<|im_start|>" + IDEFICS_CHAT,
    ),
    "mistral3": Family(
        "PreTrainedTokenizerFast",
        "bytes",
        ("<s>", "</s>", "<pad>", "<unk>"),
        numbered(tiny.IMAGE, "[IMG]") | numbered(102, "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"),
        "PixtralProcessor",
        {
            **PIXELS,
            "image_processor_type": "PixtralImageProcessor",
            "patch_size": tiny.PATCH,
            "size": {"longest_edge": 32},
        },
        {
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
            "image_token": "[IMG]",
            "patch_size": tiny.PATCH,
            "spatial_merge_size": 2,
        },
        template=PIXTRAL_CHAT,
    ),
    "qwen": Family("Qwen2Tokenizer", "bytes", QWEN, {}, "LlavaProcessor", {}),  # all else stands in ``qwen_vl.py``
    "qwen2_vl": qwen("Qwen2VLProcessor", min_pixels=16 * 16, max_pixels=48 * 48),
    "qwen2_5_vl": qwen("Qwen2_5_VLProcessor", min_pixels=16 * 16, max_pixels=48 * 48),
    **dict.fromkeys(
        ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        qwen("Qwen3VLProcessor", "Qwen2VLImageProcessorFast", size={"longest_edge": 48**2, "shortest_edge": 16**2}),
    ),
    "glm4v": Family(
        "PreTrainedTokenizerFast",
        "bytes",
        (None, "<|user|>", "<|endoftext|>", None),
        numbered(tiny.IMAGE, "<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>")
        | numbered(tiny.ROW, "<|begin_of_video|>", "<|end_of_video|>", "[gMASK]", "<sop>", "<|assistant|>"),
        "Glm4vProcessor",
        qwen_pixels("Glm4vImageProcessor", size={"shortest_edge": 2 * 16 * 16, "longest_edge": 2 * 48 * 48}),
        template=GLM_CHAT,
    ),
    "gemma3": Family(
        "GemmaTokenizer",
        "gemma",
        ("<bos>", "<eos>", "<pad>", "<unk>"),
        numbered(tiny.IMAGE, "<image_soft_token>")
        | numbered(102, "<start_of_image>", "<end_of_image>", "<start_of_turn>", "<end_of_turn>"),
        "Gemma3Processor",
        {
            **PIXELS,
            "image_processor_type": "Gemma3ImageProcessor",
            "do_pan_and_scan": None,
            "image_seq_length": 16,
            "size": square(32),
        },
        {"image_seq_length": 16},
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        GEMMA_CHAT,
    ),
    "paligemma": Family(
        "GemmaTokenizer",
        "gemma",
        ("<bos>", "<eos>", "<pad>", "<unk>"),
        {tiny.IMAGE: "<image>"},
        "PaliGemmaProcessor",
        {
            **PIXELS,
            "image_processor_type": "SiglipImageProcessor",
            "image_seq_length": 16,
            "size": square(16),
        },
    ),
    "lfm2_vl": Family(
        "PreTrainedTokenizerFast",
        "bytes",
        ("<|startoftext|>", "<|im_end|>", "<|pad|>", None),
        CHATML
        | numbered(tiny.IMAGE, "<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")
        | numbered(110, *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5))),
        "Lfm2VlProcessor",
        {
            **PIXELS,
            "image_processor_type": "Lfm2VlImageProcessorFast",
            "do_image_splitting": True,
            "do_pad": True,
            "downsample_factor": 2,
            "encoder_patch_size": tiny.PATCH,
            "max_image_tokens": 16,
            "max_num_patches": 64,
            "max_tiles": 4,
            "min_image_tokens": 4,
            "min_tiles": 2,
            "size": square(TILE),
            "tile_size": TILE,
            "use_thumbnail": True,
        },
        {"image_token": "<image>"},
        template=LFM2_CHAT,
    ),
}

SIZES = {"square": (40, 40), "tall": (30, 60), "wide": (200, 50)}  # width, height
COUNTS = {  # family -> the image tokens of the square picture, of the square and the tall one together, of the wide one
    "llava": (25, 50, 25),  # resized and cropped
    "llava_next": (24, 40, 14),  # a small picture of 4 tokens, then tiles less their padding, with an end to each row
    "llava_onevision": (24, 10, 14),  # the same; of several pictures the small one alone, with an end
    "internvl": (16, 64, 80),  # 1 tile; 1 tile, and 2 with the small picture; 4 with the small picture
    "idefics3": (80, 128, 48),  # 2 x 2 tiles and the small picture; 2 x 1 for the tall one; 1 x 2
    "smolvlm": (80, 128, 48),
    "mistral3": (16, 24, 4),  # 4 x 4; 4 x 4 and 4 x 2; 1 x 4
    "qwen": (256, 512, 256),
    "qwen2_vl": (25, 57, 36),  # 5 x 5; 5 x 5 and 8 x 4; 3 x 12
    "qwen2_5_vl": (25, 57, 36),
    "qwen3_vl": (25, 57, 36),
    "qwen3_vl_moe": (25, 57, 36),
    "qwen3_5": (25, 57, 36),
    "qwen3_5_moe": (25, 57, 36),
    "glm4v": (25, 57, 36),
    "gemma3": (16, 32, 16),
    "paligemma": (16, 32, 16),
    "lfm2_vl": (16, 26, 80),  # 4 x 4; 4 x 4 and 5 x 2; 4 tiles and the small picture, 2 x 8
}
