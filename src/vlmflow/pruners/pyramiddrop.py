"""PyramidDrop: a share of what is left, again and again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vlmflow.pruners.method import Pruner, Stage, check_layer, check_order, check_share

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self


@dataclass(frozen=True)
class PyramidDrop(Pruner):
    """Before each of ``layers`` drop a share ``ratio`` of the remaining tokens, by that layer's own attention.

    The ranking is the last prompt token's row of the layer about to run, computed ahead on the tokens at hand.

    Source: PyramidDrop (CVPR 2025).
    Departs: the released code numbers the surviving positions anew; here they keep their rotary positions.
    """

    name = "pyramiddrop"

    layers: tuple[int, ...] = (8, 16, 24)
    ratio: float = 0.5

    def __post_init__(self):
        for layer in self.layers:
            check_layer(self, "layers", layer)
        check_share(self, "ratio", self.ratio)
        check_order(self, self.layers)

    def stages(self, n_layers: int, n_image: int) -> tuple[Stage, ...]:
        """One drop a layer named."""
        return tuple(
            Stage(layer, int(n_image * (1 - self.ratio) ** (number + 1)), queries="last", peek=True)
            for number, layer in enumerate(self.layers)
        )

    @classmethod
    def scaled(cls, n_layers: int) -> Self:
        """A quarter, a half and three quarters of the depth, as 8, 16 and 24 of 32."""
        quarters = [n_layers * quarter // 4 for quarter in (1, 2, 3)]
        return cls(layers=tuple(sorted({max(1, layer) for layer in quarters})))

    def before(self, layers: Sequence[int]) -> Self:
        """Other ``layers``."""
        return replace(self, layers=tuple(layers))

    def earlier(self) -> Self | None:
        """All layers one up."""
        if min(self.layers) == 1:
            return None
        return replace(self, layers=tuple(layer - 1 for layer in self.layers))
