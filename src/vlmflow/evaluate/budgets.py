"""Every method at the same mean number of image tokens a layer, so that what is compared costs the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from vlmflow.pruners import PRUNERS, VTW, FastV, HiMAP, Pruner, PyramidDrop, Random, Uniform, make_pruner

Preset = Literal["qa", "caption"]


def for_task(name: str, settings: dict[str, str], preset: Preset, n_layers: int) -> tuple[Pruner, str]:
    """A pruner by name as ``make_pruner`` gives it, himap's fields as Table 3 has them for the task; and where from.

    Raises:
        ValueError: unknown name or field, or a value that the field does not take.
    """
    if name != "himap":
        scaled = f"published defaults, scaled to {n_layers} layers"
        return make_pruner(name, settings, n_layers), _with_set(scaled, settings)
    table3 = HiMAP.preset(preset, n_layers)
    texts = {field: str(value) for field, value in vars(table3).items()}
    return make_pruner(name, texts | settings, n_layers), _with_set(f"Table 3's {preset} preset", settings)


def _with_set(origin: str, settings: dict[str, str]) -> str:
    chosen = ", ".join(f"{field}={value}" for field, value in settings.items())
    return f"{origin}; set: {chosen}" if chosen else origin


def mean_share(pruner: Pruner, n_layers: int, n_image: int = 100_000) -> float:
    """Image tokens that enter a layer, in the mean over layers, as a share of all; rounded for few tokens only."""
    return sum(pruner.schedule(n_layers, n_image)) / (n_layers * n_image)


def with_budget(name: str, share: float, n_layers: int, preset: Preset = "qa") -> Pruner:
    """A method whose mean number of image tokens entering a layer is ``share`` of all, before rounding to tokens.

    The layers are those of the task's preset (himap), or the published ones scaled to the depth; what is dropped there
    is solved for. Where they come too late for so small a share, all of a method's layers but himap's move up together,
    by as little as does. vtw drops everything at once, so it takes the layer that comes nearest: ``mean_share`` says
    what that gives.

    Raises:
        ValueError: unknown name, a share outside (0, 1), or one that the method cannot give.
    """
    if name not in PRUNERS or name == "none":
        raise ValueError(f"a budget needs one of {', '.join(n for n in PRUNERS if n != 'none')}, got {name!r}")
    if not 0 < share < 1:
        raise ValueError(f"a budget is a share of the image tokens above 0 and below 1, got {share:g}")
    start = HiMAP.preset(preset, n_layers) if name == "himap" else PRUNERS[name].scaled(n_layers)
    if isinstance(start, VTW):
        return VTW(k=min(range(1, n_layers), key=lambda k: abs(k / n_layers - share)))
    first = start.stages(n_layers, 1)[0].layer
    while not _reaches(first, share, n_layers):
        if first == 1 or isinstance(start, HiMAP):
            raise ValueError(
                f"{name} cannot give a mean of {share:.1%} of the image tokens: the first {first} of {n_layers} layers "
                f"see them all, which is {first / n_layers:.1%} already"
            )
        first -= 1
        start = _earlier(start)
    if isinstance(start, HiMAP):
        return HiMAP.budget(share * _FINE, n_layers, _FINE, preset)
    if isinstance(start, PyramidDrop):
        return replace(start, ratio=_pyramid_ratio(start.layers, share, n_layers))
    assert isinstance(start, FastV | Random | Uniform)
    return replace(start, ratio=1 - (share * n_layers - start.k) / (n_layers - start.k))


_FINE = 1_000_000  # so many image tokens that rounding does not matter


def _reaches(first: int, share: float, n_layers: int) -> bool:
    return first / n_layers < share - 1e-9


def _earlier(pruner: Pruner) -> Pruner:
    """The same method one layer up."""
    if isinstance(pruner, PyramidDrop):
        return replace(pruner, layers=tuple(layer - 1 for layer in pruner.layers))
    assert isinstance(pruner, FastV | Random | Uniform)
    return replace(pruner, k=pruner.k - 1)


def _pyramid_ratio(layers: tuple[int, ...], share: float, n_layers: int) -> float:
    widths = [end - begin for begin, end in zip((0, *layers), (*layers, n_layers), strict=True)]
    low, high = 0.0, 1.0  # of what stays at a stage
    while high - low > 1e-12:
        middle = (low + high) / 2
        mean = sum(width * middle**stage for stage, width in enumerate(widths)) / n_layers
        low, high = (middle, high) if mean < share else (low, middle)
    return 1 - high
