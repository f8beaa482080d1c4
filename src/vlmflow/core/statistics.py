"""How sure a figure is: intervals of shares, a bootstrap over clusters for all else, paired tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Real

RESAMPLES = 2000
LEVEL = 0.95
ENOUGH = 20  # clusters, for intervals that can be trusted

Statistic = Callable[[np.ndarray], np.ndarray]  # (resample, *column) -> (resample,)


@dataclass(frozen=True)
class Interval:
    """A value with its interval: of a share (see ``share``), else by the percentile bootstrap.

    ``undefined`` is the share of resamples in which the value was not defined; the interval is of the others, and is
    nan if there are none. Infinite values count as values.
    """

    value: float
    low: float
    high: float
    undefined: float = 0.0

    @classmethod
    def of(cls, value: float, resampled: Float[np.ndarray, " resample"]) -> Interval:
        """A value, and what it was in resamples (nan: not defined)."""
        defined = resampled[~np.isnan(resampled)]
        undefined = 1 - len(defined) / len(resampled)
        if not len(defined):
            return cls(value, math.nan, math.nan, undefined)
        method = "linear" if np.isfinite(defined).all() else "inverted_cdf"  # no mean of two that may be infinite
        low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method=method)
        return cls(value, float(low), float(high), undefined)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Interval:
        """The interval that ``to_dict`` wrote."""
        return cls(*(math.nan if record[field.name] is None else float(record[field.name]) for field in fields(cls)))

    def to_dict(self) -> dict[str, float | str | None]:
        """The interval in JSON's own types: nan is null, infinities are texts that ``float`` reads."""
        return {
            name: None if math.isnan(number) else str(number) if math.isinf(number) else number
            for name, number in asdict(self).items()
        }

    def text(self, form: str = ".3g") -> str:
        """The interval in words, such as ``1 [0.5, 1.5]``."""
        if math.isnan(self.value):
            return "not defined"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def times(self, scale: float) -> Interval:
        """The interval in another unit, such as percent."""
        return Interval(scale * self.value, scale * self.low, scale * self.high, self.undefined)


@dataclass(frozen=True)
class Resampled:
    """Columns of sums or means over rows, and the same in every bootstrap resample: all that is made of them is paired.

    Rows of one cluster are not independent (questions about one image): whole clusters are drawn, with replacement.
    """

    value: Float[np.ndarray, " *column"]
    resampled: Float[np.ndarray, " resample *column"]

    @classmethod
    def sums(cls, values: Real[np.ndarray, " row *column"], clusters: Int[np.ndarray, " row"], seed: int) -> Resampled:
        """Sum each column over the rows; ``clusters`` numbers each row's cluster."""
        shape, columns = values.shape[1:], np.ascontiguousarray(values.reshape(len(values), -1).T, float)
        which = np.unique(clusters, return_inverse=True)[1]
        by_cluster = [np.bincount(which, weights=column) for column in columns]
        resampled = np.concatenate(
            [np.stack([sums[draw].sum(1) for sums in by_cluster], 1) for draw in draws(len(by_cluster[0]), seed)]
        )
        return cls(columns.sum(1).reshape(shape), resampled.reshape(-1, *shape))

    @classmethod
    def means(
        cls, values: Float[np.ndarray, " row *column"], clusters: Int[np.ndarray, " row"], seed: int
    ) -> Resampled:
        """Average each column over the rows that are not nan. A single cluster gives no interval."""
        there = ~np.isnan(values)
        both = cls.sums(np.stack([np.where(there, values, 0.0), there], 1), clusters, seed)
        with np.errstate(invalid="ignore"):  # 0 / 0: nothing there to have a mean
            resampled = both.resampled[:, 0] / both.resampled[:, 1]
            value = np.asarray(both.value[0] / both.value[1])
        return cls(value, resampled if np.ptp(clusters) else np.full_like(resampled, np.nan))

    def interval(self, statistic: Statistic) -> Interval:
        """A number made of the columns, with its interval."""
        with np.errstate(divide="ignore", invalid="ignore"):  # infinities and nan are values as well
            both = statistic(np.concatenate([self.value[None], self.resampled]))
        return Interval.of(float(both[0]), both[1:])

    def p_of_zero(self, statistic: Statistic) -> float:
        """Two-sided p that a number made of the columns is 0: twice the smaller share of resamples on a side of 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            resampled = statistic(self.resampled)
        usable = resampled[~np.isnan(resampled)]
        side = 1 + min((usable <= 0).sum(), (usable >= 0).sum())
        return min(1.0, 2 * float(side) / (len(usable) + 1))


def share(right: Bool[np.ndarray, " row"] | Real[np.ndarray, " row"], clusters: Int[np.ndarray, " row"]) -> Interval:
    """The share of rows that are 1, the others being 0, with Wilson's interval for as many rows as they are worth.

    Rows of one cluster are alike, so that n rows are worth n / d independent ones. d is the variance between clusters
    over that of independent rows, at least 1. Where it cannot be told, as all rows are right, or wrong, or of one
    cluster, the rows of a cluster are taken for wholly alike: they are worth n^2 over the sum of the clusters' squared
    sizes. A bootstrap would call 24 of 24 certain, since no resample holds what was not seen.

    >>> share(np.ones(24), np.arange(24)).text(".1%")
    '100.0% [86.2%, 100.0%]'

    Source: Wilson 1927, with the effective sample size of Korn and Graubard 1998, as Franco, Little, Louis and Slud
    2019 recommend.
    """
    which = np.unique(clusters, return_inverse=True)[1]
    sizes, hits = np.bincount(which), np.bincount(which, weights=right)
    rows, groups, value = len(which), len(sizes), float(hits.sum()) / len(which)
    worth = rows**2 / int((sizes**2).sum())
    if 0 < value < 1 and groups > 1:
        between = groups / (groups - 1) * float(((hits - value * sizes) ** 2).sum()) / rows**2
        worth = rows / max(1.0, between / (value * (1 - value) / (rows - 1)))
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = (value + z**2 / (2 * worth)) / (1 + z**2 / worth)
    reach = z / (1 + z**2 / worth) * math.sqrt(value * (1 - value) / worth + (z / (2 * worth)) ** 2)
    return Interval(value, min(value, max(0.0, middle - reach)), max(value, min(1.0, middle + reach)))


def too_few(images: int) -> str:
    """What must be said of intervals over so few images, nothing where there are enough."""
    seen = f"{images} image{'s' if images != 1 else ''}"
    return f"{seen}, too few to trust intervals (under {ENOUGH})" if images < ENOUGH else ""


def clusters_of(keys: Sequence[Hashable]) -> Int[np.ndarray, " row"]:
    """Number the clusters that keys name, from the first one on."""
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([number[key] for key in keys], int)


def draws(n: int, seed: int) -> Iterator[np.ndarray]:
    """RESAMPLES rows of n draws from n, in blocks small enough for memory."""
    generator = np.random.default_rng(seed)
    block = max(1, 2_000_000 // n)
    for start in range(0, RESAMPLES, block):
        yield generator.integers(n, size=(min(block, RESAMPLES - start), n))


def mcnemar(first: Bool[np.ndarray, " sample"], second: Bool[np.ndarray, " sample"]) -> float:
    """McNemar's exact p that two methods are right equally often, from the samples on which just one is right."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    n, fewer = only_first + only_second, min(only_first, only_second)
    ways, tail = 1, 1
    for k in range(fewer):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**n)


def log_ratio(over: Float[np.ndarray, " *shape"], under: Float[np.ndarray, " *shape"]) -> Float[np.ndarray, " *shape"]:
    """log(over / under), such as D = log(E_vv / E_vt): above 0 where intra-visual flow matters more.

    Where the paper's logarithm is not defined: what is negative, from a disruption that helped, counts as 0, for it
    took nothing away. Of two zeros the ratio is nan, of one it is infinite.

    Source: Eq. 7.
    """
    over, under = np.maximum(over, 0.0), np.maximum(under, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(over) - np.log(under)
