"""Layers as they are named, cut into shallow and deep ones, and said."""

from __future__ import annotations

from collections.abc import Sequence

Layers = tuple[int, ...]


def named_layers(layers: Sequence[int], n_layers: int) -> Layers:
    """The layers that are meant, ascending: all if none is named.

    Raises:
        ValueError: one that the model has not.
    """
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise ValueError(f"layers names layer {layer}, but this model has layers 0 to {n_layers - 1}")
    return tuple(sorted(set(layers))) or tuple(range(n_layers))


def halves(count: int) -> tuple[list[int], list[int]]:
    """The first and the last half of so many parts, by number; of an odd count the middle one is in neither."""
    half = count // 2
    return list(range(half)), list(range(count - half, count))


def in_words(layers: Sequence[int]) -> str:
    """Layers in words, such as ``layers 0-3, 5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(texts)}"
