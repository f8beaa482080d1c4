"""Intervals of sums and means over clusters, paired tests, and the ratio of Eq. 7."""

import math
from dataclasses import astuple

import numpy as np
import pytest

import oracles
from vlmflow.core.statistics import (
    RESAMPLES,
    Interval,
    Resampled,
    clusters_of,
    draws,
    log_ratio,
    mcnemar,
    share,
    too_few,
)


def ratio(sums):
    return sums[..., 0] / sums[..., 1]


def mean(scores, clusters, seed=0) -> Interval:
    """The mean of scores as a ratio of sums."""
    return Resampled.sums(np.stack([scores, np.ones(len(scores))], 1), clusters, seed).interval(ratio)


def test_intervals_cover():
    """Of 95 % intervals of a known share, about 95 % hold it."""
    generator, hits = np.random.default_rng(0), 0
    for trial in range(200):
        scores = (generator.random(150) < 0.7).astype(float)
        interval = mean(scores, np.arange(150), seed=trial)
        hits += interval.low <= 0.7 <= interval.high
    assert 180 <= hits <= 199


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_of_independent_rows_have_the_published_interval(right, of, low, high):
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    interval = share(np.arange(of) < right, np.arange(of))
    assert (interval.value, interval.low, interval.high) == pytest.approx((right / of, low, high), abs=5e-5)


def test_all_right_is_not_certain():
    assert share(np.ones(24), np.arange(24)).text(".3f") == "1.000 [0.862, 1.000]"
    assert share(np.zeros(24), np.arange(24)).text(".3f") == "0.000 [0.000, 0.138]"
    assert share(np.ones(24), np.arange(24) // 8) == share(np.ones(3), np.arange(3))  # three images, asked eight times
    assert share(np.ones(24), np.zeros(24, int)).low == pytest.approx(0.207, abs=5e-4)


def test_shares_against_a_plain_loop():
    """Clusters of unequal sizes, alike and not, and numbered with gaps; few rows, so that all are often right."""
    generator = np.random.default_rng(0)
    for trial in range(300):
        clusters = np.sort(generator.choice(50, size=generator.integers(1, 40)) ** 2 // 100)
        own = generator.random(100)[clusters] if trial % 2 else generator.random()
        right = generator.random(len(clusters)) < own
        interval = share(right, clusters)
        wanted = oracles.share_interval(
            [(str(cluster), int(one)) for cluster, one in zip(clusters, right, strict=True)]
        )
        assert interval.value == pytest.approx(right.mean())
        assert (interval.low, interval.high) == pytest.approx(wanted, abs=1e-9)
        assert 0 <= interval.low <= interval.value <= interval.high <= 1


@pytest.mark.parametrize("true", [0.7, 0.97])
def test_intervals_of_shares_cover_where_answers_about_an_image_are_alike(true):
    """Forty images, some asked often; every other answer is what the image's first one was."""
    generator, hits = np.random.default_rng(0), 0
    images = np.repeat(np.arange(40), np.arange(40) % 4 * 2 + 1)
    for _ in range(400):
        first = generator.random(40) < true
        right = np.where(generator.random(len(images)) < 0.5, first[images], generator.random(len(images)) < true)
        interval = share(right, images)
        hits += interval.low <= true <= interval.high
    assert 360 <= hits <= 397


def test_few_images_are_named():
    assert too_few(1) == "1 image, too few to trust intervals (under 20)"
    assert too_few(19).startswith("19 images, too few")
    assert too_few(20) == ""


IMAGES = [7, 7, 2, 2, 2, 9, 4, 4, 7, 1]  # clusters of one to three rows, named in no order
WRONG = [1.0, 0, 0, 3, 2, 0, 40, 1, 0, 0]  # with an outlier
ASKED = [2.0, 1, 0, 0, 4, 0, 3, 1, 1, 0]  # two clusters have no denominator


@pytest.mark.parametrize("seed", [0, 5])
def test_intervals_of_sums_against_a_plain_loop(seed):
    """Two-sided 95 %: the middle of the resamples in which there is something to divide by."""
    rows = list(zip(WRONG, ASKED, strict=True))

    def plain(rows):
        return oracles.quotient(sum(row[0] for row in rows), sum(row[1] for row in rows))

    sums = Resampled.sums(np.array(rows), np.array(IMAGES), seed)
    found = sums.interval(ratio)
    resampled = [plain(drawn) for drawn in oracles.resamples(rows, IMAGES, seed)]
    low, high, undefined = oracles.middle_95(resampled)
    assert 0 < undefined < 0.1
    assert (found.value, found.low, found.high, found.undefined) == pytest.approx((plain(rows), low, high, undefined))
    assert sums.value.tolist() == [sum(WRONG), sum(ASKED)]


def test_intervals_of_means_against_a_plain_loop():
    """Rows that are nan count neither above nor below, column by column."""
    rows = [
        (wrong, math.nan if number in (0, 4, 7) else asked)
        for number, (wrong, asked) in enumerate(zip(WRONG, ASKED, strict=True))
    ]

    def plain(rows):
        return oracles.mean([row[0] for row in rows]) - oracles.mean([row[1] for row in rows])

    means = Resampled.means(np.array(rows)[:, None], np.array(IMAGES), 3)
    found = means.interval(lambda m: m[..., 0, 0] - m[..., 0, 1])
    low, high, undefined = oracles.middle_95([plain(drawn) for drawn in oracles.resamples(rows, IMAGES, 3)])
    assert (found.value, found.low, found.high, found.undefined) == pytest.approx((plain(rows), low, high, undefined))


@pytest.mark.parametrize(("less", "middling"), [(6.0, True), (2.0, True), (0.05, False)])
def test_p_against_a_plain_loop(less, middling):
    """Two-sided, never 0, on clusters some of which have no denominator."""
    rows = list(zip(WRONG, ASKED, strict=True))

    def plain(rows):
        return oracles.quotient(sum(row[0] for row in rows), sum(row[1] for row in rows)) - less

    p = Resampled.sums(np.array(rows), np.array(IMAGES), 1).p_of_zero(lambda sums: ratio(sums) - less)
    resampled = [plain(drawn) for drawn in oracles.resamples(rows, IMAGES, 1)]
    assert p == pytest.approx(oracles.two_sided_p(resampled))
    assert (0.2 < p < 0.95) if middling else (0 < p < 0.01)


def test_ninety_five_percent_is_two_sided():
    """2.5 % lie on either side, between two resamples in proportion; where some are infinite, at a resample."""

    def of(resampled):
        return astuple(Interval.of(7.0, np.array(resampled, float)))

    assert of(range(80, -1, -1)) == pytest.approx((7.0, 2.0, 78.0, 0.0))
    some = [*range(7), *[math.nan] * 3]
    low, high, undefined = oracles.middle_95(some)
    assert of(some) == pytest.approx((7.0, low, high, undefined))
    assert of([*range(99), math.inf]) == (7.0, 2.0, 97.0, 0.0)
    assert of([*range(9), -math.inf]) == (7.0, -math.inf, 8.0, 0.0)


def test_units_and_words():
    interval = Interval(0.5, 0.25, 0.875, 0.1)
    assert interval.times(100) == Interval(50.0, 25.0, 87.5, 0.1)
    assert interval.text() == "0.5 [0.25, 0.875]"
    assert interval.text(".1%") == "50.0% [25.0%, 87.5%]"
    assert interval.to_dict() == {"value": 0.5, "low": 0.25, "high": 0.875, "undefined": 0.1}


def test_draws_come_in_blocks_as_they_would_at_once():
    """So that memory is bounded whatever the number of clusters; every resample is there, none twice."""
    blocks = list(draws(3000, seed=4))
    assert [len(block) for block in blocks] == [666, 666, 666, 2]
    assert np.array_equal(np.concatenate(blocks), np.random.default_rng(4).integers(3000, size=(RESAMPLES, 3000)))
    assert [block.shape for block in draws(10, seed=0)] == [(RESAMPLES, 10)]


def test_intervals_are_seeded_and_see_clusters():
    scores, alone = np.tile([1.0, 1.0, 1.0, 0.0], 50), np.arange(200)
    assert mean(scores, alone, 3) == mean(scores, alone, 3)
    assert mean(scores, alone, 3) != mean(scores, alone, 4)
    blocks = np.repeat([1.0, 0.0], 100)  # all of an image right, or all wrong
    wide, narrow = (mean(blocks, clusters) for clusters in (np.repeat(np.arange(10), 20), alone))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert mean(np.ones(1), np.zeros(1, int)) == Interval(1, 1, 1)


def test_means_are_those_of_rows_and_clusters_are_drawn():
    generator = np.random.default_rng(0)
    values, images = generator.random((60, 2, 3)), np.arange(60) // 3
    values[5, 1, 2] = np.nan
    means = Resampled.means(values, images, seed=1)
    assert means.value == pytest.approx(np.nanmean(values, 0))
    wide = means.interval(lambda m: m[..., 0, 0])
    assert wide.value == means.value[0, 0]
    assert wide.low < wide.value < wide.high
    same = Resampled.means(np.repeat(values[:20], 3, axis=0), images, seed=1).interval(lambda m: m[..., 0, 0])
    alone = Resampled.means(values[:20], np.arange(20), seed=1).interval(lambda m: m[..., 0, 0])
    assert (same.low, same.high) == pytest.approx((alone.low, alone.high))  # asked thrice, an image tells no more
    assert Resampled.means(values, images, seed=2).interval(lambda m: m[..., 0, 0]) != wide


def test_one_cluster_gives_no_interval_of_a_mean():
    interval = Resampled.means(np.arange(60.0), np.zeros(60, int), seed=1).interval(lambda mean: mean)
    assert interval.value == 29.5
    assert math.isnan(interval.low)
    assert interval.undefined == 1


def test_what_is_made_of_one_draw_is_paired():
    """Scores that vary much but lose the same everywhere have a loss without doubt."""
    whole = np.linspace(0, 1, 30)
    values = np.stack([whole, whole - 0.25, whole - 0.5], 1)
    means = Resampled.means(values, np.arange(30), seed=0)
    lost = means.interval(lambda m: m[..., 0] - m[..., 1])
    assert (lost.low, lost.high) == pytest.approx((0.25, 0.25))
    relation = means.interval(lambda m: log_ratio(m[..., 0] - m[..., 2], m[..., 0] - m[..., 1]))
    assert (relation.low, relation.high) == pytest.approx((math.log(2), math.log(2)))


def test_undefined_resamples_are_counted_and_infinite_ones_are_values():
    lost = np.array([1.0, 0.0, 0.0])  # by one disruption of three samples, by the other never
    means = Resampled.means(np.stack([lost, np.zeros(3)], 1), np.arange(3), seed=0)
    interval = means.interval(lambda m: log_ratio(m[..., 0], m[..., 1]))
    assert interval.value == interval.low == interval.high == math.inf
    assert interval.undefined == pytest.approx((2 / 3) ** 3, abs=0.05)
    nothing = means.interval(lambda m: log_ratio(m[..., 1], m[..., 1]))
    assert math.isnan(nothing.value)
    assert nothing.undefined == 1


def test_p_of_a_difference():
    generator = np.random.default_rng(0)
    first = (generator.random(400) < 0.6).astype(float)
    second = np.maximum(first, generator.random(400) < 0.2)
    sums = Resampled.sums(np.stack([first, second], 1), np.arange(400), 0)
    assert sums.p_of_zero(lambda s: s[..., 1] - s[..., 0]) < 0.01
    assert sums.p_of_zero(lambda s: s[..., 0] - s[..., 0]) == 1


def test_log_ratio_in_every_case():
    def of(over, under):
        return float(log_ratio(np.array([over]), np.array([under]))[0])

    assert of(0.2, 0.1) == pytest.approx(math.log(2))
    assert of(0.1, 0.2) == pytest.approx(-math.log(2))
    assert of(0.1, 0.0) == of(0.1, -0.3) == math.inf
    assert of(0.0, 0.1) == of(-0.3, 0.1) == -math.inf
    assert math.isnan(of(0.0, 0.0))
    assert math.isnan(of(-0.1, -0.2))
    assert math.isnan(of(math.nan, 0.1))


def test_clusters_are_numbered_as_they_come():
    assert clusters_of(["b", "a", "b", ("c", 1)]).tolist() == [0, 1, 0, 2]


def test_mcnemar_exact():
    def outcomes(only_first: int, only_second: int) -> tuple[np.ndarray, np.ndarray]:
        first = np.array([True] * only_first + [False] * only_second + [True, False])
        second = np.array([False] * only_first + [True] * only_second + [True, False])
        return first, second

    for b, c in ((0, 0), (1, 0), (5, 5), (2, 10), (10, 2), (0, 20), (30, 50)):
        n = b + c
        expected = min(1.0, 2 * sum(math.comb(n, k) for k in range(min(b, c) + 1)) / 2**n)
        assert mcnemar(*outcomes(b, c)) == pytest.approx(expected, rel=1e-12)
    assert mcnemar(*outcomes(2, 10)) == pytest.approx(0.03857421875)
    assert mcnemar(*outcomes(3000, 4000)) < 1e-30
