"""Qwen-VL and Qwen-VL-Chat of 2023, in the layout they were published in: no code of theirs is run."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from vlmflow.models.qwen_vl.config import QwenVLConfig, QwenVLVisionConfig
from vlmflow.models.qwen_vl.convert import convert
from vlmflow.models.qwen_vl.model import CONVERSIONS, QwenVLForConditionalGeneration
from vlmflow.models.qwen_vl.processor import answer_settings, published_processor

__all__ = [
    "QwenVLConfig",
    "QwenVLForConditionalGeneration",
    "QwenVLVisionConfig",
    "answer_settings",
    "convert",
    "published_processor",
    "register",
]


def register() -> None:
    """Make transformers' auto classes know the type ``qwen``; what is known already wins over a checkpoint's code."""
    AutoConfig.register(QwenVLConfig.model_type, QwenVLConfig, exist_ok=True)
    AutoModelForImageTextToText.register(QwenVLConfig, QwenVLForConditionalGeneration, exist_ok=True)
    register_checkpoint_conversion_mapping(QwenVLConfig.model_type, CONVERSIONS, overwrite=True)
