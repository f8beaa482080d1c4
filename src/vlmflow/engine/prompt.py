"""What a prompt consists of, as the models around the text decoder are called: only they see token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlmflow.core.layout import Layout
from vlmflow.engine.target import Target


@dataclass(frozen=True)
class Prompt:
    """What the model around the text decoder was called with."""

    image: Bool[Tensor, "batch length"]
    answer: Bool[Tensor, "batch length"]  # tokens that follow the prompt proper
    mask: Any  # of any form that a model takes

    @classmethod
    def read(cls, target: Target, ids: Int[Tensor, "batch length"] | None, kwargs: dict[str, Any]) -> Prompt:
        """Find the images in a call of the model, by its token ids or by the embeddings that it was given."""
        if ids is not None:
            image = Layout.read(ids, target.image_token_ids).image
        else:
            image = _embedded_images(target, kwargs["inputs_embeds"])
        return cls(image, _answer(image, kwargs), kwargs.get("attention_mask"))

    def layout(self, embeds: Tensor, mask: Any, past: int) -> tuple[Layout, Bool[Tensor, "batch length"]]:
        """The segments of what the text decoder reads, and which of it is prompt; ``mask`` is the decoder's own."""
        batch, length = embeds.shape[:2]
        padding = _padding(mask if self.mask is None else self.mask, batch, length, past, embeds.device)
        layout = Layout(self.image.to(embeds.device) & ~padding, padding)
        return layout, ~padding & ~self.answer.to(embeds.device)


def _embedded_images(target: Target, embeds: Tensor) -> Bool[Tensor, "batch length"]:
    table = target.core.get_input_embeddings()
    image = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    for token_id in target.image_token_ids:
        image |= (embeds == table(torch.full((), token_id, device=embeds.device))).all(-1)
    return image


def _answer(image: Tensor, kwargs: dict[str, Any]) -> Bool[Tensor, "batch length"]:
    """Which tokens are no prompt: a teacher-forced answer, or the drafts of assisted decoding's first pass.

    Assisted decoding hands over an empty cache, and asks for the logits of the drafts and of the token before them.
    In transformers 5.0 generation hands over no cache at first; what tells it from a plain call are cache positions.
    """
    follows = torch.zeros_like(image)
    labels, cache, kept = kwargs.get("labels"), kwargs.get("past_key_values"), kwargs.get("logits_to_keep", 0)
    if labels is not None:
        answer = labels.to(image.device) != -100
        asked = (Layout(image, follows).question & ~answer).any(1, keepdim=True)
        follows = answer & asked  # where all text is taught, nothing tells the answer from the question
    generating = kwargs.get("cache_position") is not None if cache is None else int(cache.get_seq_length()) == 0
    if isinstance(kept, int) and kept > 1 and generating:
        follows[:, 1 - kept :] = True
    return follows


def _padding(mask: Any, batch: int, length: int, past: int, device: torch.device) -> Bool[Tensor, "batch length"]:
    """Which of the new positions are padding, from any mask that a model takes."""
    if isinstance(mask, dict):  # by layer type
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.zeros(batch, length, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor):
        raise ValueError(f"vlmflow: cannot read an attention mask of type {type(mask).__name__}")
    if mask.dim() == 2:
        visible = mask[:, -length:].to(device).bool()
    else:
        row = mask[:, 0, -1, past : past + length].to(device)  # the last query sees all but padding
        visible = row if row.dtype == torch.bool else row == 0
    return ~visible.expand(batch, length)
