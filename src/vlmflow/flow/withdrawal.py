"""How early a model can do without its image: the choice of VTW's layer on a few samples."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlmflow.engine import prune
from vlmflow.engine.target import Target
from vlmflow.flow.prediction import next_token
from vlmflow.pruners import VTW, Unpruned


@dataclass(frozen=True)
class Withdrawal:
    """The layer from which visual tokens can be withdrawn, and how far each candidate was from the whole model.

    ``layer`` is None if no candidate was near enough. ``divergence`` has, by candidate, the mean KL divergence in
    nats; for candidates given up early it is what was sure by then, a lower bound, and they are not in ``exact``.
    """

    layer: int | None
    eta: float
    divergence: Mapping[int, float]
    exact: frozenset[int]


@torch.no_grad()
def withdrawal(
    model: nn.Module,
    samples: Sequence[Mapping[str, Any]],
    eta: float,
    layers: Collection[int] | None = None,
    exhaustive: bool = False,
) -> Withdrawal:
    """The first layer k for which VTW(k) leaves the next token's distribution nearly as it was.

    Nearly: the mean over samples of KL(withdrawn || original), of the last prompt token's logits, is at most ``eta``.
    ``samples`` are what the model's forward takes, single prompts or left-padded batches; ``layers`` are the
    candidates, all from layer 1 on if None.

    Divergences are not negative, so a candidate is given up as soon as the sum so far is above what ``eta`` allows
    all samples; and candidates behind the first that does are not tried. ``exhaustive`` measures all of them whole.

    Source: VTW (AAAI 2025), its released search: 20 samples, eta 0.003 (LLaVA-1.5-7B), 0.0005 (13B) and 0.0001
    (LLaVA-1.6-7B).
    Departs: it tries layers from 5 on, and measures each on all samples; the choice among these is the same.

    Raises:
        ValueError: no samples, a sample without image, eta that is not positive, or a layer that the model has not.
    """
    if not samples:
        raise ValueError("withdrawal: no samples to choose by; give some (20 in the published search)")
    if not eta > 0:
        raise ValueError(f"withdrawal: eta must be a positive divergence in nats, got {eta}")
    whole: list[Tensor] = []
    for number, sample in enumerate(samples):
        with prune(model, Unpruned()) as trace:
            whole.append(next_token(model, sample))
        if not all(trace.image_tokens[0]):
            raise ValueError(f"withdrawal: sample {number} has no image to withdraw; leave it out")
    candidates = range(1, len(Target.find(model).layers)) if layers is None else sorted(layers)
    count = sum(len(rows) for rows in whole)
    chosen: int | None = None
    divergence: dict[int, float] = {}
    exact: set[int] = set()
    for layer in candidates:
        total = 0.0
        with prune(model, VTW(layer)):
            for sample, before in zip(samples, whole, strict=True):
                total += float(kl_divergence(next_token(model, sample), before).sum())
                if total > eta * count and not exhaustive:
                    break
            else:
                exact.add(layer)
        divergence[layer] = total / count
        if total <= eta * count and chosen is None:
            chosen = layer
            if not exhaustive:
                break
    return Withdrawal(chosen, eta, divergence, frozenset(exact))


def kl_divergence(
    withdrawn: Float[Tensor, "batch vocab"], original: Float[Tensor, "batch vocab"]
) -> Float[Tensor, " batch"]:
    """KL(withdrawn || original) of the distributions that two sets of logits stand for, in nats."""
    p, q = withdrawn.double().log_softmax(-1), original.double().log_softmax(-1)
    terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))  # a token ruled out adds nothing
    return terms.sum(-1).clamp(min=0.0)
