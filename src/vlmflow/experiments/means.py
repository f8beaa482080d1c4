"""Means over samples with intervals, whatever is made of them: all statistics share the same resamples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from vlmflow.flow.consistency import RESAMPLES, Interval


@dataclass(frozen=True)
class Means:
    """Means over samples of any number of columns, and the same in every bootstrap resample.

    Samples about one image are not independent: whole images are drawn. With a single one there is no interval.
    """

    value: Float[np.ndarray, " *column"]
    resampled: Float[np.ndarray, " resample *column"]

    @classmethod
    def of(cls, values: Float[np.ndarray, " sample *column"], images: Sequence[Hashable], seed: int) -> Means:
        """Of one row of values a sample, and what images it is about; nan is left out."""
        number = {image: i for i, image in enumerate(dict.fromkeys(images))}
        which, there = [number[image] for image in images], ~np.isnan(values)
        sums, counts = (np.zeros((len(number), *values.shape[1:])) for _ in range(2))
        np.add.at(sums, which, np.where(there, values, 0.0))
        np.add.at(counts, which, there)
        times = np.random.default_rng(seed).multinomial(
            len(number), np.full(len(number), 1 / len(number)), size=RESAMPLES
        )
        if len(number) == 1:
            times = np.zeros_like(times)
        with np.errstate(invalid="ignore"):  # 0 / 0: nothing there to have a mean
            value = sums.sum(0) / counts.sum(0)
            return cls(value, np.tensordot(times, sums, 1) / np.tensordot(times, counts, 1))

    def interval(self, statistic: Callable[[np.ndarray], np.ndarray]) -> Interval:
        """A number made of the means, (resample, *column) -> (resample,), with its interval."""
        with np.errstate(divide="ignore", invalid="ignore"):  # infinities and nan are values as well
            return Interval.of(float(statistic(self.value[None])[0]), statistic(self.resampled))


def log_ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """log(over / under) as ``vlmflow.flow.consistency.log_ratio`` has it where it is not defined, for many at once."""
    over, under = np.maximum(over, 0.0), np.maximum(under, 0.0)
    return np.log(over) - np.log(under)
