"""HiMAP: the question ranks first, then the image itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vlmflow.pruners.method import Pruner, Stage, Task, check_layer, check_order, check_share, kept_after

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self


@dataclass(frozen=True)
class HiMAP(Pruner):
    """Hierarchical Modality-Aware Pruning: first by the question's attention, then by the image's own.

    Layers 0 to ``k1 - 1`` see all image tokens; a share ``r1`` is dropped by the attention that the question pays
    them in layer ``k1 - 1`` (Eq. 8). Before layer ``k2`` a share ``r2`` of the rest is dropped by the attention that
    they receive from each other in layer ``k2 - 1`` (Eq. 9, column sums).

    >>> HiMAP().schedule(n_layers=32, n_image=576)[::4]
    (576, 288, 72, 72, 72, 72, 72, 72)

    Source: HiMAP (CVPR 2025), section 4.1 and Table 3.
    Departs: Eq. 9's indices say what a token gives; its text, and the released code, say what it receives.
    """

    name = "himap"

    k1: int = 2
    r1: float = 0.5
    k2: int = 8
    r2: float = 0.75

    def __post_init__(self):
        check_layer(self, "k1", self.k1)
        check_layer(self, "k2", self.k2)
        check_share(self, "r1", self.r1)
        check_share(self, "r2", self.r2)
        check_order(self, [self.k1, self.k2])

    def stages(self, n_layers: int, n_image: int) -> tuple[Stage, ...]:
        """Two drops."""
        shallow = kept_after(n_image, self.r1)
        return (
            Stage(self.k1, shallow, queries="question"),
            Stage(self.k2, kept_after(shallow, self.r2), queries="image"),
        )

    @classmethod
    def preset(cls, task: Task, n_layers: int = 32) -> Self:
        """Table 3's settings for a task: ``qa`` (multiple choice, hallucination) or ``caption`` (and open answers).

        Table 3 has K1 = 2 at 32 layers and 3 at 40, K2 = 8 (qa) or 15 (caption) at both. Other depths take K1 as a
        sixteenth of the depth, and K2 as printed from 32 layers on, in proportion below; both rounded half up.

        >>> HiMAP.preset("caption", n_layers=40)
        HiMAP(k1=3, r1=0.5, k2=15, r2=0.75)

        Raises:
            ValueError: unknown task, or fewer than 3 layers.
        """
        if task not in ("qa", "caption"):
            raise ValueError(f"HiMAP.preset: task must be 'qa' or 'caption', got {task!r}")
        if n_layers < 3:
            raise ValueError(f"HiMAP.preset: two stages need at least 3 layers, got n_layers={n_layers}")
        k1 = max(1, (n_layers + 8) // 16)
        printed = {"qa": 8, "caption": 15}[task]
        k2 = printed if n_layers >= 32 else (printed * n_layers + 16) // 32
        return cls(k1=k1, k2=max(k1 + 1, k2))

    @classmethod
    def scaled(cls, n_layers: int) -> Self:
        """``preset("qa", n_layers)``."""
        return cls.preset("qa", n_layers)

    @classmethod
    def for_task(cls, task: Task, n_layers: int) -> tuple[Self, str]:
        """``preset(task, n_layers)``."""
        return cls.preset(task, n_layers), f"Table 3's {task} preset"

    def before(self, layers: Sequence[int]) -> Self:
        """Other ``k1`` and ``k2``."""
        k1, k2 = layers
        return replace(self, k1=k1, k2=k2)

    def dropping(self, share: float) -> Self:
        """Both shares moved: where x stays after the first drop, x³ stays after the second (a half, an eighth)."""
        return replace(self, r1=share, r2=1 - (1 - share) ** 2)

    @classmethod
    def budget(cls, mean_tokens: float, n_layers: int, n_image: int, task: Task = "qa") -> Self:
        """The preset's layers, with shares that give a wanted mean number of image tokens entering a layer.

        ``dropping`` says how the shares move. Rounding to whole tokens moves the mean by less than one.

        Raises:
            ValueError: a mean that these layers cannot give, with the range that they can.
        """
        preset = cls.preset(task, n_layers)
        least = n_image * preset.k1 / n_layers
        if not least < mean_tokens <= n_image:
            raise ValueError(
                f"HiMAP.budget: mean_tokens must be above {least:g} and at most {n_image} ({n_image} image tokens, "
                f"{n_layers} layers of which the first {preset.k1} see them all), got {mean_tokens:g}"
            )
        return preset.at_budget(mean_tokens / n_image, n_layers)
