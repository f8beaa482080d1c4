"""What a disruption changes: consistencies, E_l and D_l, and their intervals."""

import math

import numpy as np
import pytest
import torch

from vlmflow.flow.consistency import (
    bias_interval,
    bootstrap,
    label_consistency,
    log_ratio,
    log_ratio_interval,
    mean_interval,
    needing_image,
    prediction_bias,
    score_consistency,
)


def test_labels_are_compared():
    assert label_consistency(["A", "B", "C"], ["A", "C", "C"]).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="shorter"):
        label_consistency([1, 2], [1])


def test_a_label_is_compared_whole():
    """The released script would find "A" in "Bad Answer", and count it as kept."""
    assert label_consistency(["A"], ["Bad Answer"]).tolist() == [0]


def test_scores_are_compared_as_sets():
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 6, 12, generator=generator)
    after[0] = before[0] * 2 + 1  # the same order
    after[1] = -before[1]
    for top in (1, 5):
        expected = []
        for one, other in zip(before, after, strict=True):
            first, second = set(one.topk(top).indices.tolist()), set(other.topk(top).indices.tolist())
            expected.append(len(first & second) / len(first | second))
        assert score_consistency(before, after, top).tolist() == pytest.approx(expected)
    assert score_consistency(before, after)[0] == 1
    assert score_consistency(before, after)[1] == 0
    with pytest.raises(ValueError, match="top must be at most the vocabulary's 12, got 13"):
        score_consistency(before, after, top=13)


def test_bias_is_what_is_lost():
    assert prediction_bias(np.ones(4), np.array([1, 0.5, 0, 0.5])) == 0.5
    assert prediction_bias(np.zeros(2), np.array([0, 1])) == -0.5


def test_log_ratio_in_every_case():
    assert log_ratio(0.2, 0.1) == pytest.approx(math.log(2))
    assert log_ratio(0.1, 0.2) == pytest.approx(-math.log(2))
    assert log_ratio(0.1, 0.0) == log_ratio(0.1, -0.3) == math.inf
    assert log_ratio(0.0, 0.1) == log_ratio(-0.3, 0.1) == -math.inf
    assert math.isnan(log_ratio(0.0, 0.0))
    assert math.isnan(log_ratio(-0.1, -0.2))
    assert math.isnan(log_ratio(math.nan, 0.1))


def test_intervals_are_seeded_and_cover():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(40):
        values = generator.random(60)
        interval = mean_interval(values, seed=trial)
        assert interval == mean_interval(values, seed=trial)
        assert interval.low < interval.value < interval.high
        covered += interval.low < 0.5 < interval.high
    assert interval != mean_interval(values, seed=0)
    assert 34 <= covered <= 40


def test_pairs_stay_together():
    """Scores that vary much but lose the same everywhere have a bias without doubt."""
    whole = np.linspace(0, 1, 30)
    interval = bias_interval(whole, whole - 0.25)
    assert interval.low == pytest.approx(0.25)
    assert interval.high == pytest.approx(0.25)
    ratio = log_ratio_interval(whole, whole - 0.5, whole - 0.25)
    assert ratio.low == pytest.approx(ratio.high) == pytest.approx(math.log(2))


def test_undefined_resamples_are_counted():
    whole, one_lost = np.ones(3), np.array([0.0, 1.0, 1.0])
    interval = log_ratio_interval(whole, one_lost, whole)
    assert interval.value == interval.low == interval.high == math.inf
    assert interval.undefined == pytest.approx((2 / 3) ** 3, abs=0.05)
    nothing = log_ratio_interval(whole, whole, whole)
    assert math.isnan(nothing.value)
    assert math.isnan(nothing.low)
    assert nothing.undefined == 1
    with pytest.raises(ValueError, match="no samples"):
        bootstrap(lambda draw: 0.0, 0)


def test_samples_that_need_no_image_are_dropped():
    assert needing_image([True, False, False, True]) == [1, 2]
