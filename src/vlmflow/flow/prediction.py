"""What a model says next to a prompt, and the token with which the right answer would begin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlmflow.core.layout import Layout
from vlmflow.engine import attach
from vlmflow.flow.target_tokens import likeliest, spellings
from vlmflow.models import VLM, Question


@dataclass(frozen=True)
class Prediction:
    """One encoded prompt with the logits of its next token; ``target`` is the token that is asked about."""

    inputs: Mapping[str, Any]
    layout: Layout
    logits: Float[Tensor, " vocab"]
    target: int


@torch.no_grad()
def predict(vlm: VLM, question: Question, answer: str | None) -> Prediction:
    """Encode a prompt and predict; the target is how the model would begin ``answer``, or its own if None.

    Raises:
        ValueError: no token spells the answer, or one outside the vocabulary does.
    """
    inputs = vlm.encode([question])
    with attach(vlm.model) as trace:
        logits = next_token(vlm, inputs)
        layout = trace.layout
    if answer is None:
        return Prediction(inputs, layout, logits, int(logits.argmax()))
    tokenizer = vlm.processor.tokenizer
    end = tokenizer.decode(inputs["input_ids"][0][layout.question[0]])  # an answer's spelling hangs on no more
    return Prediction(inputs, layout, logits, likeliest(spellings(tokenizer, end, answer), logits)[0])


@torch.no_grad()
def next_token(vlm: VLM, inputs: Mapping[str, Any]) -> Float[Tensor, " vocab"]:
    """The logits of the next token of the one prompt that ``inputs`` hold."""
    return vlm.model(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1].float()
