"""FastV: the last prompt token ranks, once."""

from __future__ import annotations

from dataclasses import dataclass

from vlmflow.pruners.method import Pruner, Stage, check_layer, check_share, kept_after


@dataclass(frozen=True)
class FastV(Pruner):
    """Drop a share ``ratio`` before layer ``k`` by the attention of the last prompt token in layer ``k - 1``.

    Source: FastV (ECCV 2024), as its released code ranks: the last token's row, mean over heads.
    """

    name = "fastv"

    k: int = 2
    ratio: float = 0.5

    def __post_init__(self):
        check_layer(self, "k", self.k)
        check_share(self, "ratio", self.ratio)

    def stages(self, n_layers: int, n_image: int) -> tuple[Stage, ...]:
        """One drop."""
        return (Stage(self.k, kept_after(n_image, self.ratio), queries="last"),)
