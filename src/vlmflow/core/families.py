"""What we know of each model family: one row a ``model_type``; no torch, no transformers.

Every type that is pruned has a row. One whose costs are known has more: a reader of its vision tower here, one tiny
model in ``tests/tiny.py``, one checkpoint in ``tests/checkpoints.py`` and one row in the README.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vlmflow.core.geometry import Geometry, Tower
from vlmflow.core.widths import (
    Config,
    dense_decoder,
    gemma3_tower,
    glm4v_tower,
    gpt_oss_decoder,
    idefics3_tower,
    internvl_tower,
    lfm2_decoder,
    lfm2_vl_tower,
    llava_tower,
    mistral3_tower,
    paligemma_tower,
    qwen2_5_vl_tower,
    qwen2_vl_tower,
    qwen3_5_decoder,
    qwen3_5_moe_decoder,
    qwen3_5_tower,
    qwen3_vl_tower,
    qwen_vl_tower,
    routed_decoder,
)

TEXTS = ("llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")  # that any may carry
IMAGE_TOKEN_IDS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")  # as configs name them


@dataclass(frozen=True)
class Family:
    """The models of one ``model_type``: what they are known as, and what they have of their own."""

    model_type: str
    known_as: str  # the checkpoints by which users know it
    tower: Callable[[Config, int], Tower] | None = None  # reads the vision tower, from the config and the text's width
    texts: tuple[str, ...] = TEXTS  # the model_types of its text decoders
    decoder: Callable[[Config], Geometry] = dense_decoder  # reads the text decoder
    answer_type: int = 0  # the token_type_ids of an answer


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llava", "LLaVA-1.5", llava_tower),  # some carry a Pixtral tower
        Family("llava_next", "LLaVA-NeXT (1.6)", llava_tower),
        Family("llava_onevision", "LLaVA-OneVision", llava_tower),
        Family("internvl", "InternVL 2.5, 3, 3.5 (-hf)", internvl_tower),
        Family("idefics3", "Idefics3", idefics3_tower),
        Family("smolvlm", "SmolVLM, SmolVLM2", idefics3_tower),
        Family("mistral3", "Mistral Small 3.1 (Pixtral tower)", mistral3_tower),
        Family("qwen", "Qwen-VL, Qwen-VL-Chat (2023)", qwen_vl_tower, texts=("qwen2",)),
        Family("qwen2_vl", "Qwen2-VL", qwen2_vl_tower, texts=("qwen2_vl_text",)),
        Family("qwen2_5_vl", "Qwen2.5-VL", qwen2_5_vl_tower, texts=("qwen2_5_vl_text",)),
        Family("qwen3_vl", "Qwen3-VL", qwen3_vl_tower, texts=("qwen3_vl_text",)),
        Family("qwen3_vl_moe", "Qwen3-VL MoE", qwen3_vl_tower, texts=("qwen3_vl_moe_text",), decoder=routed_decoder),
        Family("qwen3_5", "Qwen3.5", qwen3_5_tower, texts=("qwen3_5_text",), decoder=qwen3_5_decoder),
        Family("qwen3_5_moe", "Qwen3.5 MoE", qwen3_5_tower, texts=("qwen3_5_moe_text",), decoder=qwen3_5_moe_decoder),
        Family("glm4v", "GLM-4.1V", glm4v_tower, texts=("glm4v_text",)),
        Family("gemma3", "Gemma 3", gemma3_tower),
        Family("paligemma", "PaliGemma 1, 2", paligemma_tower, answer_type=1),  # the suffix, which is causal
        Family("lfm2_vl", "LFM2-VL", lfm2_vl_tower, texts=("lfm2",), decoder=lfm2_decoder),
        # pruned like those above, but nobody has worked out their costs
        Family("aria", "Aria"),
        Family("aya_vision", "Aya Vision"),
        Family("blip-2", "BLIP-2"),
        Family("chameleon", "Chameleon"),
        Family("cohere2_vision", "Command A Vision"),
        Family("cohere_compass", "North Micro Vision"),
        Family("cosmos3_edge", "Cosmos3 Edge"),
        Family("cosmos3_omni", "Cosmos3 Nano"),
        Family("deepseek_ocr2", "DeepSeek-OCR 2"),
        Family("deepseek_vl", "DeepSeek-VL 1.3B"),
        Family("deepseek_vl_hybrid", "DeepSeek-VL 7B"),
        Family("dots3_note", "dots3 note"),
        Family("emu3", "Emu3"),
        Family("ernie4_5_vl_moe", "ERNIE 4.5 VL"),
        Family("exaone4_5", "EXAONE 4.5"),
        Family("fast_vlm", "FastVLM"),
        Family("fuyu", "Fuyu"),
        Family("gemma3n", "Gemma 3n"),
        Family("gemma4", "Gemma 4"),
        Family("gemma4_unified", "Gemma 4 12B"),
        Family("glm46v", "GLM-4.6V"),
        Family("glm4v_moe", "GLM-4.5V"),
        Family("glm_ocr", "GLM-OCR"),
        Family("glmga", "GLMGA"),
        Family("got_ocr2", "GOT-OCR 2.0"),
        Family("granite4_vision", "Granite Vision 4"),
        Family("granite_docling", "Granite Docling"),
        Family("hunyuan_vl", "HunyuanOCR"),
        Family("hyperclovax_vision_v2", "HyperCLOVA X SEED Think"),
        Family("idefics2", "Idefics2"),
        Family("instructblip", "InstructBLIP"),
        Family("instructblipvideo", "InstructBLIP for videos"),
        Family("janus", "Janus, Janus-Pro"),
        Family("kimi_k25", "Kimi K2.5, K2.6"),
        Family("lfm3_vl", "LFM3-VL"),
        Family("lighton_ocr", "LightOnOCR"),
        Family("llama4", "Llama 4"),
        Family("llava_next_video", "LLaVA-NeXT-Video"),
        Family("minicpm_ocr", "MiniCPM-OCR"),
        Family("minicpmv4_6", "MiniCPM-V 4.6"),
        Family("minicpmv4_7", "MiniCPM-V 4.7"),
        Family("minimax_m3_vl", "MiniMax-M3"),
        Family("mistral_large4", "Mistral Large 4"),
        Family("molmo2", "Molmo2"),
        Family("muse_glimmer", "Muse Glimmer"),
        Family("muse_spark", "Muse Spark"),
        Family("ovis2", "Ovis2"),
        Family("paddleocr_vl", "PaddleOCR-VL"),
        Family("perception_lm", "Perception LM"),
        Family("phi4_multimodal", "Phi-4 multimodal"),
        Family("pp_chart2table", "PP-Chart2Table"),
        Family("qianfan_ocr", "Qianfan-OCR"),
        Family("qwen2_5_omni", "Qwen2.5-Omni"),
        Family("qwen2_5_omni_thinker", "Qwen2.5-Omni, its thinker alone"),
        Family("qwen3_omni_moe", "Qwen3-Omni"),
        Family("qwen3_omni_moe_thinker", "Qwen3-Omni, its thinker alone"),
        Family("shieldgemma2", "ShieldGemma 2"),
        Family("step3p7", "Step-3.7"),
        Family("video_llama_3", "VideoLLaMA3"),
        Family("video_llava", "Video-LLaVA"),
        Family("vipllava", "ViP-LLaVA"),
    )
}
PRICED = {name: family for name, family in FAMILIES.items() if family.tower is not None}  # tested as whole checkpoints
UNLISTED = Family("", "")  # what is tried with any other model
DECODERS = {text: family.decoder for family in PRICED.values() for text in family.texts}
DECODERS |= {"qwen3_moe": routed_decoder, "gpt_oss": gpt_oss_decoder}  # which InternVL 3.5 carries too


def family_of(config: Any) -> Family:
    """The row of a Hugging Face config's ``model_type``, or ``UNLISTED``."""
    return FAMILIES.get(config.model_type, UNLISTED)


def geometry_of(config: Any) -> Geometry:
    """What decides a model's cost, read from its config, multimodal or text only.

    Raises:
        ValueError: a family whose costs are not known, or a config that lacks an attribute.
    """
    whole = Config(config)
    text = Config(whole.optional("text_config") or config)
    if text.model_type not in DECODERS:
        raise text.of_unknown_type(DECODERS)
    geometry = DECODERS[text.model_type](text)
    if whole.optional("vision_config") is None:
        return geometry
    if (tower := family_of(config).tower) is None:
        raise whole.of_unknown_type(PRICED)
    return replace(geometry, vision=tower(whole, geometry.hidden))
