"""Muon in float32: torch's own computes in bfloat16, which processors without such units do thirty times slower."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration (K. Jordan, Muon, 2024)
ITERATIONS = 5


def orthogonalise(matrices: Float[Tensor, "batch rows columns"]) -> Float[Tensor, "batch rows columns"]:
    """Bring every singular value of every matrix near one."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised; for hidden matrices. Matrices of one shape are handled together.

    Source: K. Jordan, "Muon: an optimizer for hidden layers" (2024); defaults as torch.optim.Muon.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.01, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step on every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    shapes.setdefault(weight.shape, []).append(weight)
            for shape, weights in shapes.items():
                updates = orthogonalise(torch.stack([self._moved(w, group["momentum"]) for w in weights]))
                rate = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for weight, update in zip(weights, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _moved(self, weight: Tensor, momentum: float) -> Tensor:
        """The gradient with Nesterov momentum."""
        state, gradient = self.state[weight], weight.grad
        if gradient is None:
            raise AssertionError("only weights with gradients are stepped")
        buffer = state.setdefault("momentum", torch.zeros_like(weight))
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)
