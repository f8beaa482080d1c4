"""What a pruning method is: where it drops image tokens, how many stay, which ones, and how it meets a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vlmflow.core.cost import Cost, Score, cost_of
from vlmflow.core.geometry import Geometry

if TYPE_CHECKING:
    from typing import Self  # which beartype, the tests' judge, refuses in a method

    from jaxtyping import Float
    from torch import Tensor

    from vlmflow.pruners.view import View

Queries = Literal["question", "image", "last"]
Task = Literal["qa", "caption"]

_FINE = 10**12  # so many image tokens that rounding to whole ones does not matter
_MOST = 1 - 1e-7  # a share dropped whose rest, squared as HiMAP does, still differs from nothing


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
class Pruner:
    """A pruning method. Subclasses say ``stages``, and ``score`` where attention received is not what ranks.

    ``name`` is what records and the command line call it: the class's name in small letters, where it gives none.
    A method that drops a share ``ratio`` before a layer ``k`` needs no more than that to be set to a budget; one with
    other fields says ``dropping`` and ``earlier``, or ``at_budget`` itself.
    """

    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        """Give the class its name.

        Raises:
            ValueError: a name that cannot be a folder's and an option's, or that is one of vlmflow's own methods'.
        """
        cls.name = vars(cls).get("name", cls.__name__.lower())
        if not cls.name.replace("-", "_").isidentifier():
            raise ValueError(f"{cls.__name__}: name must be letters, digits, - and _, got {cls.name!r}")
        if not is_shipped(cls) and any(cls.name == own.name for own in Pruner.__subclasses__() if is_shipped(own)):
            raise ValueError(f"{cls.__name__}: {cls.name!r} is one of vlmflow's own methods; give it another name")

    def stages(self, n_layers: int, n_image: int) -> tuple[Stage, ...]:
        """The drops for one sample of ``n_image`` image tokens; their layers must not depend on ``n_image``."""
        raise NotImplementedError

    def score(self, view: View) -> Float[Tensor, "batch image"]:
        """Rank the image tokens: the highest stay, and of equals the earlier one."""
        return view.received

    @classmethod
    def scaled(cls, n_layers: int) -> Self:
        """The published defaults, with layers in proportion where a model is not as deep as the published one."""
        return cls()

    @classmethod
    def for_task(cls, task: Task, n_layers: int) -> tuple[Self, str]:
        """The method as its source sets it for a kind of task, and where from, for records; by default ``scaled``."""
        return cls.scaled(n_layers), f"published defaults, scaled to {n_layers} layers"

    def fitted(self, attends: Sequence[bool]) -> Self:
        """The method for a decoder of which only some layers attend, such as Qwen3.5's.

        The nearest attention layer before a drop ranks for it. A stage that has none between the stage before and
        itself is moved to the first layer where it has.

        >>> from vlmflow import HiMAP
        >>> HiMAP().fitted([False, False, False, True] * 8)
        HiMAP(k1=4, r1=0.5, k2=8, r2=0.75)

        Raises:
            ValueError: no layer is left for a stage.
        """
        stages, layers = self.checked_stages(len(attends), 0), [0]
        for stage in stages:
            layer = max(stage.layer, layers[-1] + 1)
            while stage.queries is not None and not any(attends[layers[-1] : layer + stage.peek]):
                layer += 1
                if layer == len(attends):
                    raise ValueError(f"{self}: too few of {len(attends)} layers attend to rank for each of its stages")
            layers.append(layer)
        moved = layers[1:]
        return self if moved == [stage.layer for stage in stages] else self.before(moved)

    def before(self, layers: Sequence[int]) -> Self:
        """The same stages before other layers, one each: by default its field ``k``."""
        (k,) = layers
        return replace(self, k=k)

    def dropping(self, share: float) -> Self:
        """The same method with another share dropped: by default its field ``ratio``.

        Raises:
            ValueError: it has no such field.
        """
        if all(field.name != "ratio" for field in fields(self)):
            raise ValueError(
                f"{self.name} cannot be set to a budget: it has no field ratio, a share dropped; "
                f"say {type(self).__name__}.dropping or at_budget"
            )
        return replace(self, ratio=share)

    def earlier(self) -> Self | None:
        """The same method one layer earlier: by default its field ``k``; None if that cannot be."""
        k = vars(self).get("k", 1)
        return replace(self, k=k - 1) if k > 1 else None

    def at_budget(self, share: float, n_layers: int) -> Self:
        """The method with a mean of ``share`` of all image tokens entering a layer, before rounding to tokens.

        What it drops is solved for, by bisection over its schedule. Where it drops too late for so small a share, it
        moves up, by as little as does.

        Raises:
            ValueError: a share that it cannot give.
        """
        method = self
        while (least := method.dropping(_MOST).mean_share(n_layers)) >= share:
            earlier = method.earlier()
            if earlier is None:
                first = method.dropping(_MOST).schedule(n_layers, _FINE).count(_FINE)
                seen = f"the first {first} of {n_layers} layers see them all, which is {first / n_layers:.1%} already"
                why = seen if first / n_layers >= share - 1e-6 else f"{least:.1%} is the least that it gives"
                raise ValueError(f"{self.name} cannot give a mean of {share:.1%} of the image tokens: {why}")
            method = earlier
        low, high = 0.0, _MOST
        while high - low > 1e-12:
            middle = (low + high) / 2
            too_many = method.dropping(middle).mean_share(n_layers) >= share
            low, high = (middle, high) if too_many else (low, middle)
        found = method.dropping(round(low, 10))  # finer than any schedule; 0.625 rather than 0.6250000000004696
        if abs((nearest := found.mean_share(n_layers)) - share) > 1e-6:
            raise ValueError(
                f"{self.name} cannot give a mean of {share:.1%} of the image tokens: {nearest:.1%} is the nearest"
            )
        return found

    def mean_share(self, n_layers: int, n_image: int = _FINE) -> float:
        """Image tokens that enter a layer, in the mean over layers, as a share of all; rounded for few tokens only.

        >>> from vlmflow import VTW
        >>> VTW(k=8).mean_share(n_layers=32)
        0.25
        """
        return sum(self.schedule(n_layers, n_image)) / (n_layers * n_image)

    def schedule(self, n_layers: int, n_image: int) -> tuple[int, ...]:
        """Image tokens that enter each decoder layer.

        >>> from vlmflow import FastV
        >>> FastV(k=2, ratio=0.75).schedule(n_layers=4, n_image=576)
        (576, 576, 144, 144)
        """
        stages = self.checked_stages(n_layers, n_image)
        return tuple(
            min([n_image, *(stage.keep for stage in stages if stage.layer <= layer)]) for layer in range(n_layers)
        )

    def checked_stages(self, n_layers: int, n_image: int) -> tuple[Stage, ...]:
        """``stages``, refused if the model is too shallow for them.

        Raises:
            ValueError: a stage outside layers 1 to ``n_layers - 1``, stages out of order, or one that keeps fewer
                than no tokens.
        """
        stages = self.stages(n_layers, n_image)
        for stage in stages:
            if not 1 <= stage.layer < n_layers:
                raise ValueError(
                    f"{self}: prunes before layer {stage.layer}, but this model allows layers 1 to {n_layers - 1} "
                    f"({n_layers} layers, and layer 0 always sees every token)"
                )
            if stage.keep < 0:
                raise ValueError(f"{self}: keep must be a count of image tokens that stay, got {stage.keep}")
        check_order(self, [stage.layer for stage in stages])
        return stages

    def cost(self, geometry: Geometry, n_image: int, n_text: int, n_question: int, dtype_bytes: int = 2) -> Cost:
        """What one sample of ``n_image`` image and ``n_text`` text tokens costs, pruned and not, ranking included.

        ``n_question`` of the text tokens follow the last image.

        >>> from vlmflow import HiMAP
        >>> from vlmflow.core.geometry import geometry_named
        >>> print(HiMAP().cost(geometry_named("llava-1.5-7b"), n_image=576, n_text=60, n_question=20))
        full attention        unpruned      pruned   share
        mean_image_tokens          576         144   25.0%
        paper_flops         2.9861e+12  7.3531e+11   24.6%
        exact_flops         8.4498e+12  2.6754e+12   31.7%
        decode_flops        1.3549e+10  1.3322e+10   98.3%
        kv_bytes            3.3345e+08  1.0695e+08   32.1%
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
        return {"name": self.name, **asdict(self)}


def is_shipped(cls: type[Pruner]) -> bool:
    """Whether a method is vlmflow's own."""
    return cls.__module__.startswith("vlmflow.")


def kept_after(count: int, share_dropped: float) -> int:
    """How many of ``count`` tokens stay when a share of them is dropped; halves are rounded to even.

    >>> kept_after(576, 0.75)
    144

    Raises:
        ValueError: a share outside [0, 1].
    """
    if not 0 <= share_dropped <= 1:
        raise ValueError(f"kept_after: share_dropped must be in [0, 1], got {share_dropped!r}")
    return round(count * (1 - share_dropped))


def check_layer(pruner: Pruner, field: str, layer: int) -> None:
    """Refuse a field that is no layer to prune before.

    Raises:
        ValueError: by the field's name.
    """
    if not isinstance(layer, int) or isinstance(layer, bool) or layer < 1:
        raise ValueError(
            f"{type(pruner).__name__}: {field} must be a whole number of at least 1 "
            f"(layer 0 always sees every token), got {layer!r}"
        )


def check_share(pruner: Pruner, field: str, share: float) -> None:
    """Refuse a field that is no share to drop; everything is not one.

    Raises:
        ValueError: by the field's name.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise ValueError(f"{type(pruner).__name__}: {field} must be a share in [0, 1), got {share!r}")


def check_order(pruner: Pruner, layers: Sequence[int]) -> None:
    """Refuse layers that do not rise from stage to stage.

    Raises:
        ValueError: with the layers.
    """
    if any(later <= earlier for earlier, later in pairwise(layers)):
        raise ValueError(f"{type(pruner).__name__}: layers must increase from stage to stage, got {list(layers)}")
