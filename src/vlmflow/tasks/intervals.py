"""Bootstrap intervals of ratios of sums, and paired tests between two methods; numpy only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


def bootstrap(
    numerator: np.ndarray, denominator: np.ndarray, clusters: np.ndarray, seed: int = 0
) -> tuple[float, float, float] | None:
    """sum(numerator) / sum(denominator) with its percentile interval: (value, low, high).

    Whole clusters are drawn with replacement: rows of one cluster number are not independent. None if the
    denominator sums to 0.
    """
    if not denominator.sum():
        return None
    tops, bottoms = _per_cluster(numerator, clusters), _per_cluster(denominator, clusters)
    ratios = np.concatenate([_ratio(tops[draw], bottoms[draw]) for draw in _draws(len(tops), seed)])
    return (float(numerator.sum() / denominator.sum()), *_middle(ratios))


def paired_bootstrap(
    numerator: np.ndarray,
    denominator: np.ndarray,
    other_numerator: np.ndarray,
    other_denominator: np.ndarray,
    clusters: np.ndarray,
    seed: int = 0,
) -> tuple[float, float, float, float] | None:
    """The other ratio minus this one, with its percentile interval and p: (difference, low, high, p).

    Both methods are resampled by the same draws. p is two-sided: twice the smaller share of differences on either
    side of 0. None if a denominator sums to 0.
    """
    if not denominator.sum() or not other_denominator.sum():
        return None
    columns = (numerator, denominator, other_numerator, other_denominator)
    top, bottom, other_top, other_bottom = (_per_cluster(column, clusters) for column in columns)
    differences = np.concatenate(
        [
            _ratio(other_top[draw], other_bottom[draw]) - _ratio(top[draw], bottom[draw])
            for draw in _draws(len(top), seed)
        ]
    )
    value = float(other_numerator.sum() / other_denominator.sum() - numerator.sum() / denominator.sum())
    usable = differences[~np.isnan(differences)]
    side = 1 + min((usable <= 0).sum(), (usable >= 0).sum())
    return (value, *_middle(differences), min(1.0, 2 * float(side) / (len(usable) + 1)))


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """McNemar's exact p that two methods are right equally often, from the samples on which just one is right."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    n, fewer = only_first + only_second, min(only_first, only_second)
    ways, tail = 1, 1
    for k in range(fewer):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**n)


def _per_cluster(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    return np.bincount(np.unique(clusters, return_inverse=True)[1], weights=values)


def _draws(n: int, seed: int) -> Iterator[np.ndarray]:
    """RESAMPLES rows of n draws from n, in blocks small enough for memory."""
    generator = np.random.default_rng(seed)
    block = max(1, 2_000_000 // n)
    for start in range(0, RESAMPLES, block):
        yield generator.integers(n, size=(min(block, RESAMPLES - start), n))


def _ratio(tops: np.ndarray, bottoms: np.ndarray) -> np.ndarray:
    bottom = bottoms.sum(1)
    return np.divide(tops.sum(1), bottom, out=np.full(len(bottom), np.nan), where=bottom != 0)


def _middle(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
