"""Which tokens stay: those with the highest scores, and of equal scores the earlier one.

A batch comes padded, a row a sample, where some tokens are not ``valid``; or packed, the samples' tokens one after the
other, where those of sample ``i`` go from ``offsets[i]`` to before ``offsets[i + 1]``. Either way a sample keeps
``keep`` tokens, or all if it has fewer. NaN ranks above every number, as ``torch.sort`` has it. Nothing here waits for
the device.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def highest(
    scores: Float[Tensor, "sample token"], keep: Int[Tensor, " sample"], valid: Bool[Tensor, "sample token"]
) -> Bool[Tensor, "sample token"]:
    """Flag the tokens of a padded batch that stay."""
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    ranked = torch.gather(valid, 1, order)
    stays = ranked & (ranked.cumsum(1) <= keep[:, None])
    return torch.zeros_like(valid).scatter(1, order, stays)


def highest_packed(
    scores: Float[Tensor, " token"], keep: Int[Tensor, " sample"], offsets: Int[Tensor, " sample+1"]
) -> Bool[Tensor, " token"]:
    """Flag the tokens of a packed batch that stay."""
    place = torch.arange(scores.shape[0], device=scores.device)
    sample = torch.searchsorted(offsets[1:], place, right=True)
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(sample[order], stable=True)]  # sample by sample, in each the highest first
    stays = place - offsets[sample] < keep[sample]
    return torch.zeros_like(stays).scatter(0, order, stays)


def right_align(flags: Bool[Tensor, "batch length"], count: int) -> Int[Tensor, "batch count"]:
    """Indices of the set flags, ascending, right-aligned in ``count`` columns.

    A row with fewer than ``count`` set flags is filled up, on the left, with indices of unset ones.
    """
    order = torch.argsort(flags.to(torch.int8), dim=1, stable=True)
    return order[:, flags.shape[1] - count :]
