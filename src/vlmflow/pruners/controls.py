"""What every method is compared with: no pruning, and the two rankings that look at nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmflow.pruners.method import Pruner, Stage, check_layer, check_share, kept_after

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from vlmflow.pruners.view import View


@dataclass(frozen=True)
class Unpruned(Pruner):
    """No pruning: what every method is compared with."""

    name = "none"

    def stages(self, n_layers: int, n_image: int) -> tuple[Stage, ...]:
        """None."""
        return ()


@dataclass(frozen=True)
class Random(Pruner):
    """Control: drop a share ``ratio`` before layer ``k`` at random.

    The draw belongs to the token's number in its own sample, so it does not depend on the batch.
    """

    name = "random"

    k: int = 2
    ratio: float = 0.5
    seed: int = 0

    def __post_init__(self):
        check_layer(self, "k", self.k)
        check_share(self, "ratio", self.ratio)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**63:
            raise ValueError(f"Random: seed must be a whole number from 0 to 2**63 - 1, got {self.seed!r:.40}")

    def stages(self, n_layers: int, n_image: int) -> tuple[Stage, ...]:
        """One drop."""
        return (Stage(self.k, kept_after(n_image, self.ratio)),)

    def score(self, view: View) -> Float[Tensor, "batch image"]:
        """A uniform draw for each token."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        draws = torch.rand(max(view.total), generator=generator).to(view.ordinal.device, non_blocking=True)
        return draws[view.ordinal]


@dataclass(frozen=True)
class Uniform(Pruner):
    """Control: drop a share ``ratio`` before layer ``k`` and keep an even grid, blind to what the image shows."""

    name = "uniform"

    k: int = 2
    ratio: float = 0.5

    def __post_init__(self):
        check_layer(self, "k", self.k)
        check_share(self, "ratio", self.ratio)

    def stages(self, n_layers: int, n_image: int) -> tuple[Stage, ...]:
        """One drop."""
        return (Stage(self.k, kept_after(n_image, self.ratio)),)

    def score(self, view: View) -> Float[Tensor, "batch image"]:
        """1 for the tokens of the grid, 0 for the others."""
        import torch

        grid = torch.zeros(len(view.total), max(view.total))
        for sample, (total, keep) in enumerate(zip(view.total, view.keep, strict=True)):
            grid[sample, [(2 * j + 1) * total // (2 * keep) for j in range(keep)]] = 1
        return torch.take_along_dim(grid.to(view.ordinal.device, non_blocking=True), view.ordinal, dim=1)
