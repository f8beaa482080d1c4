"""The widths that decide what a model costs, and those of some models by name; no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from vlmflow.core.errors import refusal


@dataclass(frozen=True)
class Tower:
    """The widths that decide what a vision tower and its projector cost.

    ``patch_inputs`` values make a patch; ``merge`` patches make an image token, on which the projector spends
    ``projector`` multiply-adds. ``grid`` is a tile's (rows, columns) of patches where the model fixes it.
    With a ``window`` (side in patches) attention stays inside squares except in ``full_layers``. Pooling
    heads, which no multimodal model reads, are not counted.
    """

    hidden: int
    intermediate: int
    layers: int
    patch_inputs: int
    merge: int
    projector: int
    gated: bool = False
    class_tokens: int = 0
    grid: tuple[int, int] | None = None
    window: int | None = None
    full_layers: tuple[int, ...] = ()

    @property
    def image_tokens(self) -> int | None:
        """Image tokens of one tile, None where the image's size decides."""
        return None if self.grid is None else self.grid[0] * self.grid[1] // self.merge


@dataclass(frozen=True)
class Recurrence:
    """What a recurrent layer has in the place of attention: a state of fixed size, instead of keys and values.

    ``projections`` multiply-adds lead a token in and out, and a causal convolution of ``kernel`` taps runs along each
    of ``channels``. With ``heads``, the gated delta rule keeps a state of ``key_dim`` x ``value_dim`` in each.
    """

    layers: tuple[int, ...]
    projections: int
    channels: int
    kernel: int
    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0


class Kind(NamedTuple):
    """A decoder layer as far as its cost goes."""

    is_routed: bool
    attends: bool
    window: int | None


@dataclass(frozen=True)
class Geometry:
    """The widths that decide what a text decoder costs; its vision tower stands apart.

    ``windows`` holds each layer's sliding window in tokens (None: the layer sees all); empty means none.
    With ``experts``, every layer but ``dense_layers`` routes a token to ``experts_per_token`` MLPs of width
    ``expert_intermediate``; a ``shared_expert`` of width ``intermediate`` runs beside them, behind a gate of one
    number a token. With ``gated_attention`` a second query projection gates what attention gives. A decoder whose
    layers all attend has no ``recurrence``.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: bool = True
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_expert: bool = False
    dense_layers: tuple[int, ...] = ()
    windows: tuple[int | None, ...] = ()
    gated_attention: bool = False
    recurrence: Recurrence | None = None
    vision: Tower | None = None

    @classmethod
    def from_config(cls, config: Any) -> Geometry:
        """Read the geometry of a Hugging Face config, multimodal or text only.

        >>> from transformers import LlavaConfig
        >>> Geometry.from_config(LlavaConfig()).vision.image_tokens
        576

        Raises: ValueError where the family is not known or the config lacks an attribute.
        """
        from vlmflow.core.families import geometry_of  # families are made of readers that know this class

        return geometry_of(config)

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """What each layer is."""
        return tuple(Kind(self.routed(i), self.attends(i), self.window(i)) for i in range(self.layers))

    def routed(self, layer: int) -> bool:
        """Tell whether this layer's MLP is a mixture of experts."""
        return self.experts > 0 and layer not in self.dense_layers

    def attends(self, layer: int) -> bool:
        """Tell whether this layer is an attention layer; others are recurrent."""
        return self.recurrence is None or layer not in self.recurrence.layers

    def window(self, layer: int) -> int | None:
        """Return this layer's sliding window in tokens, None where it sees all."""
        return self.windows[layer] if self.windows else None


def multiply_adds(*widths: int) -> int:
    """Count the multiply-adds of linear layers that lead from each width to the next."""
    return sum(inputs * outputs for inputs, outputs in pairwise(widths))


def resampled(tower: Tower, queries: int, width: int) -> Tower:
    """The tower whose patches ``queries`` of this ``width`` attend to, as Qwen-VL's resampler has it.

    Of the multiply-adds of an image token, one layer leads its patches to the width, and the others are the projections
    of query, output and embedding, keys and values of its patches, and two products of attention with all patches.
    """
    assert tower.grid is not None
    patches = tower.grid[0] * tower.grid[1]
    merge = patches // queries
    attention = (3 + 2 * merge) * width**2 + 2 * patches * width
    return replace(tower, merge=merge, projector=merge * multiply_adds(tower.hidden, width) + attention)


_VICUNA_7B = Geometry(hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32, head_dim=128, vocab=32064)
_VICUNA_13B = replace(_VICUNA_7B, hidden=5120, intermediate=13824, layers=40, heads=40, kv_heads=40)
_QWEN2_7B = Geometry(hidden=3584, intermediate=18944, layers=28, heads=28, kv_heads=4, head_dim=128, vocab=152064)
_QWEN3_8B = Geometry(hidden=4096, intermediate=12288, layers=36, heads=32, kv_heads=8, head_dim=128, vocab=151936)
_CLIP = Tower(
    hidden=1024,
    intermediate=4096,
    layers=24,
    patch_inputs=3 * 14**2,
    merge=1,
    projector=multiply_adds(1024, 4096, 4096),
    class_tokens=1,
    grid=(24, 24),
)
_CLIP_13B = replace(_CLIP, projector=multiply_adds(1024, 5120, 5120))
_INTERN = replace(_CLIP, merge=4, projector=multiply_adds(4 * 1024, 3584, 3584), grid=(32, 32))
_QWEN2_5_TOWER = Tower(
    hidden=1280,
    intermediate=3420,
    layers=32,
    patch_inputs=3 * 2 * 14**2,
    merge=4,
    projector=multiply_adds(4 * 1280, 4 * 1280, 3584),
    gated=True,
    window=8,
    full_layers=(7, 15, 23, 31),
)
_QWEN3_TOWER = Tower(
    hidden=1152,
    intermediate=4304,
    layers=27,
    patch_inputs=3 * 2 * 16**2,
    merge=4,
    projector=4 * multiply_adds(4 * 1152, 4 * 1152, 4096),
)
_BIG_G = Tower(hidden=1664, intermediate=8192, layers=48, patch_inputs=3 * 14**2, merge=1, projector=0, grid=(32, 32))
GEOMETRIES: dict[str, Geometry] = {
    "llava-1.5-7b": replace(_VICUNA_7B, vision=_CLIP),
    "llava-1.5-13b": replace(_VICUNA_13B, vision=_CLIP_13B),
    "qwen-vl-chat": replace(_VICUNA_7B, vocab=151936, vision=resampled(_BIG_G, queries=256, width=4096)),
    "qwen2.5-vl-7b": replace(_QWEN2_7B, vision=_QWEN2_5_TOWER),
    "qwen3-vl-8b": replace(_QWEN3_8B, vision=_QWEN3_TOWER),
    "internvl3-8b": replace(_QWEN2_7B, vocab=151674, vision=_INTERN),
}


def geometry_named(name: str) -> Geometry:
    """Return a built-in geometry.

    Raises: ValueError where there is none of this name.
    """
    if name not in GEOMETRIES:
        known = f"one of {', '.join(GEOMETRIES)}"
        raise refusal("geometry_named", known, repr(name), "use Geometry.from_config(config) for other models")
    return GEOMETRIES[name]
