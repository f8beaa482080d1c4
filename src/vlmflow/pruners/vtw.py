"""VTW: nothing ranks; all image tokens go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vlmflow.pruners.method import Pruner, Stage, check_layer

if TYPE_CHECKING:
    from typing import Self


@dataclass(frozen=True)
class VTW(Pruner):
    """Visual tokens withdrawal: from layer ``k`` on the model sees text only.

    Source: VTW (AAAI 2025).
    """

    name = "vtw"

    k: int = 16

    def __post_init__(self):
        check_layer(self, "k", self.k)

    def stages(self, n_layers: int, n_image: int) -> tuple[Stage, ...]:
        """One drop of everything."""
        return (Stage(self.k, 0),)

    @classmethod
    def scaled(cls, n_layers: int) -> Self:
        """Half of the depth, as 16 of 32."""
        return cls(k=max(1, n_layers // 2))

    def at_budget(self, share: float, n_layers: int) -> Self:
        """The layer that comes nearest, as everything is dropped at once; ``mean_share`` says what that gives."""
        return replace(self, k=min(range(1, n_layers), key=lambda k: abs(k / n_layers - share)))
