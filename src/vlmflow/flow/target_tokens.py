"""Answers as token ids: checked, and appended to prompts for teacher forcing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

Answer = int | Sequence[int | Sequence[int]] | Int[Tensor, " batch"]


def answers_of(
    target: Answer, inputs: Mapping[str, Any], vocabulary: int, first_only: bool = False
) -> list[tuple[int, ...]]:
    """One sequence of token ids for each sample.

    Raises:
        ValueError: text, not one answer for each sample, one without a token, or an id outside the vocabulary.
    """
    ids = inputs.get("input_ids")
    if ids is None:
        raise ValueError("inputs hold no input_ids, by which image tokens are known; pass them")
    batch = ids.shape[0]
    if isinstance(target, Tensor):
        target = target.tolist()
    if (text := _text_in(target)) is not None:
        raise ValueError(
            f"target must be token ids, got the text {text!r}; take those of likeliest(spellings(tokenizer, "
            f"prompt, {text!r}), logits)"
        )
    each = [target] * batch if isinstance(target, int) else list(target)
    if len(each) != batch:
        raise ValueError(f"target has {len(each)} answers for a batch of {batch}; give one for each sample")
    answers = [(answer,) if isinstance(answer, int) else tuple(map(int, answer)) for answer in each]
    for sample, answer in enumerate(answers):
        if not answer:
            raise ValueError(f"target: the answer of sample {sample} has no token; leave the sample out")
        for token in answer:
            if not 0 <= token < vocabulary:
                raise ValueError(
                    f"target: the answer of sample {sample} has token {token}, outside the vocabulary of "
                    f"{vocabulary}; encode it with the model's own tokenizer"
                )
    return [answer[:1] for answer in answers] if first_only else answers


def _text_in(target: Any) -> str | None:
    """The first text among token ids, however deep; None where there is none."""
    if isinstance(target, str):
        return target
    parts = target if isinstance(target, Sequence) else ()
    return next((text for part in parts if (text := _text_in(part)) is not None), None)


def extend(inputs: Mapping[str, Any], answers: Sequence[Sequence[int]], answer_type: int) -> dict[str, Any]:
    """Append all but the last token of each answer to its prompt; shorter answers are filled up with padding.

    ``answer_type`` is what the family's ``token_type_ids`` say of an answer.

    Raises:
        ValueError: prompts that are padded on the right, or come with position ids of their own where these are short.
    """
    ids: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    if mask is not None and not bool(mask[..., -1].all()):
        raise ValueError("inputs are padded on the right; pad on the left, where prompts end together")
    more = max(map(len, answers)) - 1
    if not more:
        return dict(inputs)
    if inputs.get("position_ids") is not None:
        raise ValueError(
            "inputs give positions, of which the answer has none; leave position_ids out, or use over='first'"
        )
    filled = [[*answer[:-1], *[answer[0]] * (more + 1 - len(answer))] for answer in answers]
    real = [[1] * (len(answer) - 1) + [0] * (more + 1 - len(answer)) for answer in answers]
    extended = dict(inputs)
    extended["input_ids"] = torch.cat([ids, ids.new_tensor(filled)], 1)
    mask = torch.ones_like(ids) if mask is None else mask
    extended["attention_mask"] = torch.cat([mask, mask.new_tensor(real)], 1)
    if answer_type and inputs.get("token_type_ids") is None:
        extended["token_type_ids"] = torch.zeros_like(ids)
    for name, value in extended.items():
        if name not in ("input_ids", "attention_mask") and isinstance(value, Tensor) and value.shape == ids.shape:
            extended[name] = pad(value, (0, more), value=answer_type if name == "token_type_ids" else 0)
    return extended
