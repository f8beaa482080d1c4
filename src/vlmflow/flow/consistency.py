"""How much a disruption changes what a model predicts: consistency, E_l and D_l, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Real
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A value with its percentile bootstrap interval.

    ``undefined`` is the share of resamples in which the value was not defined; the interval is of the others, and is
    nan if there are none. Infinite values count as values.
    """

    value: float
    low: float
    high: float
    undefined: float = 0.0

    @classmethod
    def of(cls, value: float, resampled: Float[np.ndarray, " resample"]) -> Interval:
        """A value, and what it was in resamples."""
        defined = np.sort(resampled[~np.isnan(resampled)])
        undefined = 1 - len(defined) / len(resampled)
        if not len(defined):
            return cls(value, math.nan, math.nan, undefined)
        low, high = (  # a sample of the resampled values, not a mean of two: they may be infinite
            float(np.quantile(defined, share, method="inverted_cdf")) for share in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
        )
        return cls(value, low, high, undefined)


def label_consistency(before: Sequence[object], after: Sequence[object]) -> np.ndarray:
    """1 for each sample whose prediction stays what it was, else 0; the measure is their mean.

    Source: section 3.2. Labels are whatever can be compared: token ids, letters, answers.
    Departs: the released script asks whether the right label occurs anywhere in the disrupted output.

    Raises:
        ValueError: not one label before for each one after.
    """
    return np.array([float(one == other) for one, other in zip(before, after, strict=True)])


def score_consistency(
    before: Float[Tensor, "batch vocab"], after: Float[Tensor, "batch vocab"], top: int = 5
) -> np.ndarray:
    """Jaccard similarity of the ``top`` likeliest next tokens before and after, one a sample; the measure is the mean.

    |T ∩ T'| / |T ∪ T'|: 1 where the same tokens lead, in any order, 0 where none is left.

    Source: section 3.2, top 5. Scores may be logits or probabilities.

    Raises:
        ValueError: a vocabulary smaller than ``top``.
    """
    if before.shape[-1] < top:
        raise ValueError(f"score_consistency: top must be at most the vocabulary's {before.shape[-1]}, got {top}")
    same = (before.topk(top).indices[:, :, None] == after.topk(top).indices[:, None, :].to(before.device)).sum((1, 2))
    return (same / (2 * top - same)).double().cpu().numpy()


def prediction_bias(undisturbed: Real[np.ndarray, " sample"], disturbed: Real[np.ndarray, " sample"]) -> float:
    """E_l: the mean that a disruption of layer l takes away from a per-sample score, E_l = S - S'.

    Source: appendix D, where S is the consistency undisturbed and S' disturbed; undisturbed consistency is 1.
    Departs: a mean a sample, where the paper counts samples; D_l is the same. It is negative if the disruption helps,
    which consistency cannot do but accuracy can.
    """
    return float(np.mean(undisturbed) - np.mean(disturbed))


def log_ratio(e_vv: float, e_vt: float) -> float:
    """D_l = log(E_vv / E_vt): above 0 intra-visual flow matters more in layer l, below 0 visual-textual flow.

    Where the paper's logarithm is not defined: a negative E, from a disruption that helped, counts as 0, for it took
    nothing away. If both are 0 neither flow matters, and D_l is nan; if one is 0, D_l is infinite.

    Source: Eq. 7.
    """
    if math.isnan(e_vv) or math.isnan(e_vt):
        return math.nan
    e_vv, e_vt = max(0.0, e_vv), max(0.0, e_vt)
    if e_vv == e_vt == 0:
        return math.nan
    if e_vt == 0:
        return math.inf
    return math.log(e_vv / e_vt) if e_vv > 0 else -math.inf


def mean_interval(values: Real[np.ndarray, " sample"], seed: int = 0) -> Interval:
    """The mean of a per-sample measure, with its interval."""
    return bootstrap(lambda draw: float(np.mean(values[draw])), len(values), seed)


def bias_interval(
    undisturbed: Real[np.ndarray, " sample"], disturbed: Real[np.ndarray, " sample"], seed: int = 0
) -> Interval:
    """``prediction_bias`` with its interval, resampled in pairs."""
    return bootstrap(lambda draw: prediction_bias(undisturbed[draw], disturbed[draw]), len(undisturbed), seed)


def log_ratio_interval(
    undisturbed: Real[np.ndarray, " sample"],
    disturbed_vv: Real[np.ndarray, " sample"],
    disturbed_vt: Real[np.ndarray, " sample"],
    seed: int = 0,
) -> Interval:
    """``log_ratio`` of the two prediction biases with its interval; the three scores of a sample stay together."""

    def ratio(draw: np.ndarray) -> float:
        whole = undisturbed[draw]
        return log_ratio(prediction_bias(whole, disturbed_vv[draw]), prediction_bias(whole, disturbed_vt[draw]))

    return bootstrap(ratio, len(undisturbed), seed)


def bootstrap(statistic: Callable[[np.ndarray], float], n: int, seed: int = 0) -> Interval:
    """A statistic of samples, given by their indices, with its percentile interval: n draws with replacement.

    Raises:
        ValueError: no samples.
    """
    if n == 0:
        raise ValueError("bootstrap: no samples to resample")
    generator = np.random.default_rng(seed)
    values = np.array([statistic(generator.integers(n, size=n)) for _ in range(RESAMPLES)])
    return Interval.of(statistic(np.arange(n)), values)


def needing_image(right_without_image: Sequence[bool]) -> list[int]:
    """Indices of the samples that the model does not answer rightly when the image is taken away.

    Source: appendix B, which drops the others as samples without valid visual information.
    """
    return [sample for sample, right in enumerate(right_without_image) if not right]
