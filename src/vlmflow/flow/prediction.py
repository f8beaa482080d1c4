"""What a model says next to a prompt, and the token with which the right answer would begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlmflow.core.layout import Layout
from vlmflow.engine import attach
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
        (logits,) = next_token(vlm.model, inputs)
        layout = trace.layout
    if answer is None:
        return Prediction(inputs, layout, logits, int(logits.argmax()))
    tokenizer = vlm.processor.tokenizer
    end = tokenizer.decode(inputs["input_ids"][0][layout.question[0]])  # an answer's spelling hangs on no more
    return Prediction(inputs, layout, logits, likeliest(spellings(tokenizer, end, answer), logits)[0])


@torch.no_grad()
def next_token(model: nn.Module, inputs: Mapping[str, Any]) -> Float[Tensor, "batch vocab"]:
    """The logits of the token that follows each prompt."""
    return model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()


def spellings(tokenizer: Any, prompt: str, answer: str) -> list[tuple[int, ...]]:
    """The token ids that may spell an answer behind a prompt: with a space before it, and without.

    Which of the two a model writes depends on how its prompts were joined with answers in training, so ask the model:
    ``likeliest(spellings(...), logits)``. Spellings that would change the prompt's own tokens are left out.

    Departs: the released script takes the id of the bare letter, "A", where LLaVA writes " A", which is another one.

    Raises:
        ValueError: an answer without a token.
    """
    head, word = tokenizer.encode(prompt, add_special_tokens=False), answer.strip()
    spelled = []
    for text in (" " + word, word) if word else ():
        whole = tokenizer.encode(prompt + text, add_special_tokens=False)
        ids = tuple(whole[len(head) :])
        if whole[: len(head)] == head and ids and ids not in spelled:
            spelled.append(ids)
    if not spelled:
        raise ValueError(f"spellings: no token spells {answer!r} behind the prompt; give its token ids")
    return spelled


def likeliest(spellings: Sequence[Sequence[int]], logits: Float[Tensor, " vocab"]) -> tuple[int, ...]:
    """The spelling whose first token the model likes best, by its logits behind the prompt; of equals the first.

    Raises:
        ValueError: a spelling begins with a token outside the vocabulary.
    """
    for ids in spellings:
        if not 0 <= ids[0] < len(logits):
            raise ValueError(
                f"likeliest: token {ids[0]} is outside the vocabulary of {len(logits)}; use the model's own tokenizer"
            )
    return tuple(max(spellings, key=lambda ids: float(logits[ids[0]])))
