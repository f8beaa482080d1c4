"""Attention in blocks: one picture, many questions, none of which sees another.

The sequence is a prefix (prompt start and picture), then groups of equally long questions. A question attends to the
prefix and to itself, as if it had been asked alone; the answers equal the stock model's on separate prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaForConditionalGeneration

NAME = "pico_blockwise"


@dataclass(frozen=True)
class Blocks:
    """How a sequence divides: prefix tokens, then for each group (questions, tokens of each)."""

    prefix: int
    groups: tuple[tuple[int, int], ...]

    def positions(self) -> Tensor:
        """Rotary position of every token: each question goes on from the end of the prefix."""
        asked = [torch.arange(self.prefix, self.prefix + tokens).repeat(n) for n, tokens in self.groups]
        return torch.cat([torch.arange(self.prefix), *asked])


def _attend(
    _module: nn.Module,
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens dim"],
    _mask: Tensor | None,
    scaling: float,
    blocks: Blocks,
    **_: object,
) -> tuple[Float[Tensor, "batch tokens heads dim"], None]:
    """Causal attention inside the prefix and inside each question, full attention from questions to the prefix."""
    start, (batch, heads, _tokens, dim) = blocks.prefix, query.shape
    first_key, first_value = key[:, :, :start], value[:, :, :start]
    out = [F.scaled_dot_product_attention(query[:, :, :start], first_key, first_value, is_causal=True, scale=scaling)]
    for questions, tokens in blocks.groups:
        end = start + questions * tokens
        q, k, v = (x[:, :, start:end] for x in (query * scaling, key, value))
        split = (batch, heads, questions, tokens, dim)
        past = q @ first_key.mT
        within = q.reshape(split) @ k.reshape(split).mT
        within = within + torch.full((tokens, tokens), -torch.inf).triu(1)
        weights = torch.cat([past, within.reshape(batch, heads, questions * tokens, tokens)], -1).softmax(-1)
        within = weights[..., blocks.prefix :].reshape(batch, heads, questions, tokens, tokens) @ v.reshape(split)
        out.append(weights[..., : blocks.prefix] @ first_value + within.reshape(q.shape))
        start = end
    return torch.cat(out, 2).transpose(1, 2), None


def use_blocks(model: LlavaForConditionalGeneration) -> None:
    """Make the model's decoder attend in blocks; its forward then takes blocks=Blocks(...)."""
    AttentionInterface.register(NAME, _attend)
    model.model.language_model.config._attn_implementation = NAME
