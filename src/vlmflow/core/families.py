"""What we know of each model family: one row a ``model_type``; no torch, no transformers.

A family that is like others is one row here, one tiny model in ``tests/tiny.py``, one checkpoint in
``tests/checkpoints.py`` and one row in the README.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlmflow.core.geometry import Geometry, Tower
from vlmflow.core.grids import Grids, as_squares, by_patch_grid, by_size
from vlmflow.core.widths import (
    Config,
    dense_decoder,
    gemma3_tower,
    glm4v_tower,
    idefics3_tower,
    internvl_tower,
    llava_tower,
    mistral3_tower,
    paligemma_tower,
    qwen2_5_vl_tower,
    qwen2_vl_tower,
    qwen3_vl_tower,
    routed_decoder,
)

TEXTS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")  # decoders that any family may carry
IMAGES = ("image_token_id",)
IMAGES_AND_VIDEOS = ("image_token_id", "video_token_id")


@dataclass(frozen=True)
class Family:
    """The models of one ``model_type``: what they are known as, and what they have of their own."""

    model_type: str
    known_as: str  # the checkpoints by which users know it
    tower: Callable[[Config, int], Tower]  # reads the vision tower, from the config and the text decoder's width
    texts: tuple[str, ...] = TEXTS  # the model_types of its text decoders
    decoder: Callable[[Config], Geometry] = dense_decoder  # reads the text decoder
    token_ids: tuple[str, ...] = IMAGES  # the config's names for the ids of its image and video tokens
    grids: tuple[Callable[[Mapping[str, Any], Config, int, int], Grids | None], ...] = (as_squares,)  # first that fits
    deepstack: bool = False  # whether visual features are added to the image tokens between decoder layers
    answer_type: int = 0  # the token_type_ids of an answer


def _unknown_tower(config: Config, width: int) -> Tower:
    raise config.of_unknown_type(FAMILIES)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llava", "LLaVA-1.5", llava_tower, grids=(by_size, as_squares)),  # some carry a Pixtral tower
        Family("llava_next", "LLaVA-NeXT (1.6)", llava_tower),
        Family("llava_onevision", "LLaVA-OneVision", llava_tower, token_ids=IMAGES_AND_VIDEOS),
        Family("internvl", "InternVL 2.5, 3, 3.5 (-hf)", internvl_tower),
        Family("idefics3", "Idefics3", idefics3_tower),
        Family("smolvlm", "SmolVLM, SmolVLM2", idefics3_tower),
        Family("mistral3", "Mistral Small 3.1 (Pixtral tower)", mistral3_tower, grids=(by_size,)),
        Family(
            "qwen2_vl",
            "Qwen2-VL",
            qwen2_vl_tower,
            texts=("qwen2_vl_text",),
            token_ids=IMAGES_AND_VIDEOS,
            grids=(by_patch_grid,),
        ),
        Family(
            "qwen2_5_vl",
            "Qwen2.5-VL",
            qwen2_5_vl_tower,
            texts=("qwen2_5_vl_text",),
            token_ids=IMAGES_AND_VIDEOS,
            grids=(by_patch_grid,),
        ),
        Family(
            "qwen3_vl",
            "Qwen3-VL",
            qwen3_vl_tower,
            texts=("qwen3_vl_text",),
            token_ids=IMAGES_AND_VIDEOS,
            grids=(by_patch_grid,),
            deepstack=True,
        ),
        Family(
            "qwen3_vl_moe",
            "Qwen3-VL MoE",
            qwen3_vl_tower,
            texts=("qwen3_vl_moe_text",),
            decoder=routed_decoder,
            token_ids=IMAGES_AND_VIDEOS,
            grids=(by_patch_grid,),
            deepstack=True,
        ),
        Family(
            "glm4v",
            "GLM-4.1V",
            glm4v_tower,
            texts=("glm4v_text",),
            token_ids=IMAGES_AND_VIDEOS,
            grids=(by_patch_grid,),
        ),
        Family("gemma3", "Gemma 3", gemma3_tower),
        Family("paligemma", "PaliGemma 1, 2", paligemma_tower, answer_type=1),  # the suffix, which is causal
    )
}
UNLISTED = Family(  # what is tried with any other model
    "",
    "",
    _unknown_tower,
    token_ids=(*IMAGES_AND_VIDEOS, "image_token_index", "video_token_index"),
    grids=(by_patch_grid, by_size, as_squares),
    deepstack=True,
)
DECODERS = {text: family.decoder for family in FAMILIES.values() for text in family.texts}


def family_of(config: Any) -> Family:
    """The row of a Hugging Face config's ``model_type``, or ``UNLISTED``."""
    return FAMILIES.get(config.model_type, UNLISTED)


def geometry_of(config: Any) -> Geometry:
    """What decides a model's cost, read from its config, multimodal or text only.

    Raises:
        ValueError: a family that is not known, or a config that lacks an attribute.
    """
    whole = Config(config)
    text = Config(whole.optional("text_config") or config)
    if text.model_type not in DECODERS:
        raise text.of_unknown_type(DECODERS)
    geometry = DECODERS[text.model_type](text)
    if whole.optional("vision_config") is None:
        return geometry
    return replace(geometry, vision=family_of(config).tower(whole, geometry.hidden))
