"""Pruning methods: each one small frozen dataclass that says where to look and how many image tokens stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, get_type_hints

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlmflow.core.attention import QueryRows, take_sequence
from vlmflow.core.cost import Cost, Score, cost_of
from vlmflow.core.geometry import Geometry

Queries = Literal["question", "image", "last"]
Task = Literal["qa", "caption"]


@dataclass(frozen=True)
class Stage:
    """One drop: before decoder layer ``layer`` (0-based) runs, ``keep`` image tokens stay.

    ``queries`` names the tokens whose attention the score reads: the question (instruction after the last image),
    the surviving image tokens, or the last prompt token; None if the score reads no attention. The attention is that
    of layer ``layer - 1``, or with ``peek`` that of ``layer`` itself, computed ahead of the drop.
    """

    layer: int
    keep: int
    queries: Queries | None = None
    peek: bool = False

    @property
    def scored_layer(self) -> int:
        """The layer whose attention ranks the tokens."""
        return self.layer if self.peek else self.layer - 1


@dataclass(frozen=True)
class View:
    """What a score may look at: the image tokens that have survived so far, in prompt order.

    Samples with fewer image tokens than the largest are filled up on the left; ``valid`` is False there.
    ``ordinal`` numbers a sample's own image tokens from 0, dropped ones included; ``total`` is how many the sample
    had at the start, ``keep`` how many will stay.
    """

    valid: Bool[Tensor, "batch image"]
    ordinal: Int[Tensor, "batch image"]
    total: tuple[int, ...]
    keep: tuple[int, ...]
    states: Float[Tensor, "batch length hidden"]
    index: Int[Tensor, "batch image"]
    column: Int[Tensor, "batch image"]
    rows: QueryRows | None

    @cached_property
    def hidden(self) -> Float[Tensor, "batch image hidden"]:
        """Hidden states of the image tokens as they are about to enter the stage's layer."""
        return take_sequence(self.states, self.index)

    @cached_property
    def attention(self) -> Float[Tensor, "batch heads query image"]:
        """Attention weights of the stage's queries to the image tokens; 0 in rows that only fill up."""
        weights = self._rows.weights()
        columns = self.column.to(weights.device)[:, None, None, :]
        return torch.take_along_dim(weights, columns, dim=3)

    @cached_property
    def received(self) -> Float[Tensor, "batch image"]:
        """Attention that each image token receives: mean over heads, sum over the stage's queries."""
        received = self._rows.received()
        return torch.take_along_dim(received, self.column.to(received.device), dim=1)

    @property
    def _rows(self) -> QueryRows:
        if self.rows is None:
            raise ValueError("View: the stage names no queries, so there is no attention to look at")
        return self.rows


@dataclass(frozen=True)
class Pruner:
    """A pruning method. Subclasses say ``stages``, and ``score`` where attention received is not what ranks."""

    def stages(self, n_layers: int, n_image: int) -> tuple[Stage, ...]:
        """The drops for one sample of ``n_image`` image tokens; their layers must not depend on ``n_image``."""
        raise NotImplementedError

    def score(self, view: View) -> Float[Tensor, "batch image"]:
        """Rank the image tokens: the highest stay, and of equals the earlier one."""
        return view.received

    @classmethod
    def scaled(cls, n_layers: int) -> Pruner:
        """The published defaults, with layers in proportion where a model is not as deep as the published one."""
        return cls()

    def schedule(self, n_layers: int, n_image: int) -> tuple[int, ...]:
        """Image tokens that enter each decoder layer."""
        stages = self.checked_stages(n_layers, n_image)
        return tuple(
            min([n_image, *(stage.keep for stage in stages if stage.layer <= layer)]) for layer in range(n_layers)
        )

    def checked_stages(self, n_layers: int, n_image: int) -> tuple[Stage, ...]:
        """``stages``, refused if the model is too shallow for them.

        Raises:
            ValueError: a stage outside layers 1 to ``n_layers - 1``, or stages out of order.
        """
        stages = self.stages(n_layers, n_image)
        for stage in stages:
            if not 1 <= stage.layer < n_layers:
                raise ValueError(
                    f"{self}: prunes before layer {stage.layer}, but this model allows layers 1 to {n_layers - 1} "
                    f"({n_layers} layers, and layer 0 always sees every token)"
                )
        _check_order(self, [stage.layer for stage in stages])
        return stages

    def cost(self, geometry: Geometry, n_image: int, n_text: int, n_question: int, dtype_bytes: int = 2) -> Cost:
        """What one sample of ``n_image`` image and ``n_text`` text tokens costs, pruned and not, ranking included.

        ``n_question`` of the text tokens follow the last image.
        """
        schedule = self.schedule(geometry.layers, n_image)
        scores = []
        for stage in self.checked_stages(geometry.layers, n_image):
            if stage.queries is not None and n_image:
                there = schedule[stage.layer - 1]  # image tokens that are ranked
                rows = {"question": n_question, "image": there, "last": 1}[stage.queries]
                tokens = there + n_text
                scores.append(Score(stage.scored_layer, rows, tokens, peek=tokens if stage.peek else 0))
        return cost_of(geometry, schedule, n_text, scores=scores, dtype_bytes=dtype_bytes)

    def to_dict(self) -> dict[str, Any]:
        """The method's name and fields, for records."""
        return {"name": next(name for name, cls in PRUNERS.items() if cls is type(self)), **asdict(self)}


@dataclass(frozen=True)
class HiMAP(Pruner):
    """Hierarchical Modality-Aware Pruning: first by the question's attention, then by the image's own.

    Layers 0 to ``k1 - 1`` see all image tokens; a share ``r1`` is dropped by the attention that the question pays
    them in layer ``k1 - 1`` (Eq. 8). Before layer ``k2`` a share ``r2`` of the rest is dropped by the attention that
    they receive from each other in layer ``k2 - 1`` (Eq. 9, column sums).

    Source: HiMAP (CVPR 2025), section 4.1 and Table 3.
    Departs: Eq. 9's indices say what a token gives; its text, and the released code, say what it receives.
    """

    k1: int = 2
    r1: float = 0.5
    k2: int = 8
    r2: float = 0.75

    def __post_init__(self):
        _check_layer(self, "k1", self.k1)
        _check_layer(self, "k2", self.k2)
        _check_share(self, "r1", self.r1)
        _check_share(self, "r2", self.r2)
        _check_order(self, [self.k1, self.k2])

    def stages(self, n_layers: int, n_image: int) -> tuple[Stage, ...]:
        """Two drops."""
        shallow = _kept(n_image, self.r1)
        return (
            Stage(self.k1, shallow, queries="question"),
            Stage(self.k2, _kept(shallow, self.r2), queries="image"),
        )

    @classmethod
    def preset(cls, task: Task, n_layers: int = 32) -> HiMAP:
        """Table 3's settings for a task: ``qa`` (multiple choice, hallucination) or ``caption`` (and open answers).

        Table 3 has K1 = 2 at 32 layers and 3 at 40, K2 = 8 (qa) or 15 (caption) at both. Other depths take K1 as a
        sixteenth of the depth, and K2 as printed from 32 layers on, in proportion below; both rounded half up.

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
    def scaled(cls, n_layers: int) -> HiMAP:
        """``preset("qa", n_layers)``."""
        return cls.preset("qa", n_layers)

    @classmethod
    def budget(cls, mean_tokens: float, n_layers: int, n_image: int, task: Task = "qa") -> HiMAP:
        """The preset's layers, with shares that give a wanted mean number of image tokens entering a layer.

        Both shares move together: where a share x stays after the first drop, x cubed stays after the second, as
        Table 3 has it (a half, an eighth). Rounding to whole tokens moves the mean by less than one.

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

        def mean(share: float) -> float:
            layers = preset.k1 + (preset.k2 - preset.k1) * share + (n_layers - preset.k2) * share**3
            return n_image * layers / n_layers

        low, high = 0.0, 1.0
        while high - low > 1e-12:
            middle = (low + high) / 2
            low, high = (middle, high) if mean(middle) < mean_tokens else (low, middle)
        return cls(k1=preset.k1, r1=1 - high, k2=preset.k2, r2=1 - high**2)


@dataclass(frozen=True)
class FastV(Pruner):
    """Drop a share ``ratio`` before layer ``k`` by the attention of the last prompt token in layer ``k - 1``.

    Source: FastV (ECCV 2024), as its released code ranks: the last token's row, mean over heads.
    """

    k: int = 2
    ratio: float = 0.5

    def __post_init__(self):
        _check_layer(self, "k", self.k)
        _check_share(self, "ratio", self.ratio)

    def stages(self, n_layers: int, n_image: int) -> tuple[Stage, ...]:
        """One drop."""
        return (Stage(self.k, _kept(n_image, self.ratio), queries="last"),)


@dataclass(frozen=True)
class VTW(Pruner):
    """Visual tokens withdrawal: from layer ``k`` on the model sees text only.

    Source: VTW (AAAI 2025).
    """

    k: int = 16

    def __post_init__(self):
        _check_layer(self, "k", self.k)

    def stages(self, n_layers: int, n_image: int) -> tuple[Stage, ...]:
        """One drop of everything."""
        return (Stage(self.k, 0),)

    @classmethod
    def scaled(cls, n_layers: int) -> VTW:
        """Half of the depth, as 16 of 32."""
        return cls(k=max(1, n_layers // 2))


@dataclass(frozen=True)
class PyramidDrop(Pruner):
    """Before each of ``layers`` drop a share ``ratio`` of the remaining tokens, by that layer's own attention.

    The ranking is the last prompt token's row of the layer about to run, computed ahead on the tokens at hand.

    Source: PyramidDrop (CVPR 2025).
    Departs: the released code numbers the surviving positions anew; here they keep their rotary positions.
    """

    layers: tuple[int, ...] = (8, 16, 24)
    ratio: float = 0.5

    def __post_init__(self):
        for layer in self.layers:
            _check_layer(self, "layers", layer)
        _check_share(self, "ratio", self.ratio)
        _check_order(self, self.layers)

    def stages(self, n_layers: int, n_image: int) -> tuple[Stage, ...]:
        """One drop a layer named."""
        return tuple(
            Stage(layer, int(n_image * (1 - self.ratio) ** (number + 1)), queries="last", peek=True)
            for number, layer in enumerate(self.layers)
        )

    @classmethod
    def scaled(cls, n_layers: int) -> PyramidDrop:
        """A quarter, a half and three quarters of the depth, as 8, 16 and 24 of 32."""
        quarters = [n_layers * quarter // 4 for quarter in (1, 2, 3)]
        return cls(layers=tuple(sorted({max(1, layer) for layer in quarters})))


@dataclass(frozen=True)
class Random(Pruner):
    """Control: drop a share ``ratio`` before layer ``k`` at random.

    The draw belongs to the token's number in its own sample, so it does not depend on the batch.
    """

    k: int = 2
    ratio: float = 0.5
    seed: int = 0

    def __post_init__(self):
        _check_layer(self, "k", self.k)
        _check_share(self, "ratio", self.ratio)

    def stages(self, n_layers: int, n_image: int) -> tuple[Stage, ...]:
        """One drop."""
        return (Stage(self.k, _kept(n_image, self.ratio)),)

    def score(self, view: View) -> Float[Tensor, "batch image"]:
        """A uniform draw for each token."""
        generator = torch.Generator().manual_seed(self.seed)
        draws = torch.rand(max(view.total), generator=generator).to(view.ordinal.device, non_blocking=True)
        return draws[view.ordinal]


@dataclass(frozen=True)
class Uniform(Pruner):
    """Control: drop a share ``ratio`` before layer ``k`` and keep an even grid, blind to what the image shows."""

    k: int = 2
    ratio: float = 0.5

    def __post_init__(self):
        _check_layer(self, "k", self.k)
        _check_share(self, "ratio", self.ratio)

    def stages(self, n_layers: int, n_image: int) -> tuple[Stage, ...]:
        """One drop."""
        return (Stage(self.k, _kept(n_image, self.ratio)),)

    def score(self, view: View) -> Float[Tensor, "batch image"]:
        """1 for the tokens of the grid, 0 for the others."""
        grid = torch.zeros(len(view.total), max(view.total))
        for sample, (total, keep) in enumerate(zip(view.total, view.keep, strict=True)):
            grid[sample, [(2 * j + 1) * total // (2 * keep) for j in range(keep)]] = 1
        return torch.take_along_dim(grid.to(view.ordinal.device, non_blocking=True), view.ordinal, dim=1)


@dataclass(frozen=True)
class Unpruned(Pruner):
    """No pruning: what every method is compared with."""

    def stages(self, n_layers: int, n_image: int) -> tuple[Stage, ...]:
        """None."""
        return ()


PRUNERS: dict[str, type[Pruner]] = {
    "none": Unpruned,
    "himap": HiMAP,
    "fastv": FastV,
    "vtw": VTW,
    "pyramiddrop": PyramidDrop,
    "random": Random,
    "uniform": Uniform,
}


def make_pruner(name: str, settings: Mapping[str, str], n_layers: int) -> Pruner:
    """A pruner by name: its published defaults scaled to the depth, with fields set from text (``0.5``, ``2,4``).

    Raises:
        ValueError: unknown name or field, or a value that the field does not take.
    """
    values = parse_fields(name, settings)
    return replace(PRUNERS[name].scaled(n_layers), **values)


def parse_fields(name: str, settings: Mapping[str, str]) -> dict[str, Any]:
    """The values that a pruner's fields are set to by text.

    Raises:
        ValueError: unknown name or field, or text that is no value of the field's type.
    """
    if name not in PRUNERS:
        raise ValueError(f"unknown pruner {name!r}; choose from {', '.join(PRUNERS)}")
    kinds = {field.name: get_type_hints(PRUNERS[name])[field.name] for field in fields(PRUNERS[name])}
    values: dict[str, Any] = {}
    for field, text in settings.items():
        if field not in kinds:
            takes = f"its fields are {', '.join(kinds)}" if kinds else "it has no fields"
            raise ValueError(f"pruner {name} has no field {field!r}; {takes}")
        values[field] = _parse(name, field, kinds[field], text)
    return values


def _parse(name: str, field: str, kind: Any, text: str) -> Any:
    try:
        return tuple(int(part) for part in text.split(",")) if kind == tuple[int, ...] else kind(text)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}.get(kind, "whole numbers with commas between")
        raise ValueError(f"pruner {name}: {field} must be {wanted}, got {text!r}") from None


def _kept(count: int, share_dropped: float) -> int:
    return round(count * (1 - share_dropped))


def _check_layer(pruner: Pruner, field: str, layer: int) -> None:
    if not isinstance(layer, int) or isinstance(layer, bool) or layer < 1:
        raise ValueError(
            f"{type(pruner).__name__}: {field} must be a whole number of at least 1 "
            f"(layer 0 always sees every token), got {layer!r}"
        )


def _check_share(pruner: Pruner, field: str, share: float) -> None:
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise ValueError(f"{type(pruner).__name__}: {field} must be a share in [0, 1), got {share!r}")


def _check_order(pruner: Pruner, layers: list[int] | tuple[int, ...]) -> None:
    if any(later <= earlier for earlier, later in pairwise(layers)):
        raise ValueError(f"{type(pruner).__name__}: layers must increase from stage to stage, got {list(layers)}")
