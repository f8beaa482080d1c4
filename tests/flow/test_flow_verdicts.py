"""What the analysis makes of its rows: means with intervals, judged claims, hypotheses."""

import json
import math
from dataclasses import astuple, replace

import numpy as np
import pytest

import oracles
from vlmflow.core.statistics import Interval
from vlmflow.flow.contributions import ByLayer, takes_over
from vlmflow.flow.layers import halves, in_words, named_layers
from vlmflow.flow.verdict import HYPOTHESES, claim, figure_title, in_markdown, judged, judgements
from vlmflow.flow.windows import ByWindow, ends
from vlmflow.records.schema import StudyCounts, StudyRow, StudySummary

WHOLE = Interval(1.0, 0.5, 1.5)


# -- judgements


@pytest.mark.parametrize(
    ("interval", "judgement"),
    [
        (Interval(1.0, 0.5, 1.5), "holds"),
        (Interval(1.0, -0.1, 1.5), "undecided"),
        (Interval(-1.0, -1.5, -0.5), "does not hold"),
        (Interval(0.0, 0.0, 0.0), "does not hold"),
        (Interval(math.inf, math.inf, math.inf), "holds"),
        (Interval(1.0, 0.5, 1.5, undefined=0.2), "undecided"),
        (Interval(1.0, math.nan, math.nan, undefined=1.0), "undecided"),
    ],
)
def test_claims_are_judged_by_their_intervals(interval, judgement):
    assert claim("", interval).judgement == judgement


def test_a_hypothesis_holds_if_all_its_claims_do():
    yes, no, open_ = claim("", WHOLE), claim("", Interval(-1.0, -2.0, -0.5)), claim("", Interval(0.1, -1.0, 1.0))
    assert judged([yes, yes]).judgement == "holds"
    assert judged([yes, open_]).judgement == "undecided"
    assert judged([open_, no]).judgement == "does not hold"
    assert judged([]).judgement == "undecided"


def test_numbers_survive_json():
    wild = Interval(math.nan, -math.inf, math.inf, 0.5)
    read = Interval.from_dict(json.loads(json.dumps(wild.to_dict(), allow_nan=False)))
    assert (read.low, read.high, read.undefined) == (-math.inf, math.inf, 0.5)
    assert math.isnan(read.value)
    assert read.text() == "not defined"
    assert Interval.from_dict(WHOLE.to_dict()).text() == "1 [0.5, 1.5]"


def test_layers_are_named_and_said():
    assert named_layers((), 3) == (0, 1, 2)
    assert named_layers((2, 0, 2), 3) == (0, 2)
    assert in_words([0, 1, 2, 5]) == "layers 0-2, 5"
    assert in_words([4]) == "layer 4"
    with pytest.raises(ValueError, match="layers names layer 3, but this model has layers 0 to 2"):
        named_layers((3,), 3)
    assert ends(40) == [(0, 1, 2, 3, 4), (35, 36, 37, 38, 39)]
    assert ends(6) == [(0, 1, 2), (3, 4, 5)]


def test_intra_visual_flow_takes_over_once_visual_textual_flow_leads_no_more():
    vt, vv, none = "visual-textual", "intra-visual", "neither"
    assert takes_over(dict(enumerate([vt, vt, none, vv, vv]))) == 3
    assert takes_over(dict(enumerate([vt, vv, vt, none, vv]))) == 4
    assert takes_over(dict(enumerate([vt, vv, vt]))) is None
    assert takes_over(dict(enumerate([vv, vv]))) is None


@pytest.mark.parametrize(
    ("images", "ends"), [(19, "; 19 images, too few to trust intervals (under 20)."), (20, " and else bootstraps.")]
)
def test_a_verdict_says_of_how_many_it_is_and_whether_to_believe_it(images, ends):
    claims = [
        claim("this is more", Interval(0.25, 0.125, 0.5, undefined=0.04)),
        claim("that is more", Interval(0.5, -0.25, 1.0)),
    ]
    summary = StudySummary(
        settings={"experiment": "saliency", "model": "llava", "task": "pico"},
        samples=StudyCounts(asked=40, dropped=7, failed=3, kept=30, images=images),
        failed={},
        right=Interval(0.5, 0.25, 0.75),
        lengths={},
        hypotheses={"H1": judged(claims[:1]), "H2": judged([])},
    )
    page = in_markdown(summary, ["a section", "another"])
    assert page.startswith("# Saliency of llava on pico\n\n40 samples: 7 dropped, as they were answered")
    assert f"as well, 3 failed, 30 kept, about {images} images." in page
    assert "first token was the likeliest for 50.0% [25.0%, 75.0%]. Intervals are of 95 % over images" in page
    opening, *sections = page.split("\n\n")[1:]
    assert opening.endswith(ends)
    assert sections == ["a section", "another\n"]
    assert figure_title(summary) == "llava on pico, 30 samples"
    first, none = judgements(summary)
    (open_,) = judgements(replace(summary, hypotheses={"H1": judged(claims)}))
    said = "- this is more: 0.25 [0.125, 0.5], holds (not defined in 4% of resamples)"
    assert first == f"## H1 holds\n\nThat {HYPOTHESES['H1']}.\n\n{said}"
    assert none == (
        f"## H2 is undecided\n\nThat {HYPOTHESES['H2']}.\n\n"
        "- not judged: with so few layers there is no shallow and no deep part"
    )
    assert open_.startswith("## H1 is undecided\n")
    assert open_.endswith(f"{said}\n- that is more: 0.5 [-0.25, 1], undecided")


# -- means against plain loops

SEEN = ["a.png", "a.png", "b.png", "c.png", "c.png", "c.png", "d.png"]  # each row's image: unequal clusters


def rows_by_layer() -> list[StudyRow]:
    """Three layers; the last sample has an outlier, one sample no system token."""
    generator = np.random.default_rng(1)
    rows = []
    for number, image in enumerate(SEEN):
        found = {name: generator.uniform(0.1, 1.0, 3).tolist() for name in ("s_sys", "s_img", "s_ins", "s_vv", "s_vt")}
        found["s_vt"][1] *= 40 if number == 6 else 1
        if number == 2:
            found["s_sys"] = [None] * 3
        lengths = {"system": 5, "image": 10 + number, "instruction": 3 + number % 2}
        rows.append(StudyRow(f"{number}", (image,), lengths=lengths, found=found))
    return rows


def plain_interval(rows, statistic, seed):
    """A statistic of rows, with its interval from rows drawn by whole images."""
    found = [statistic(drawn) for drawn in oracles.resamples(rows, SEEN, seed)]
    low, high, undefined = oracles.middle_95(found)
    return pytest.approx((statistic(rows), low, high, undefined))


def test_contributions_are_means_over_samples_not_over_images():
    rows = rows_by_layer()
    summary = ByLayer().sum_up(rows, n_layers=3, seed=5)

    def mean(rows, name, layer, weight=None):
        values = [math.nan if (value := row.found[name][layer]) is None else value for row in rows]
        return oracles.mean(
            [value * (row.lengths[weight] if weight else 1) for value, row in zip(values, rows, strict=True)]
        )

    for name in ("s_sys", "s_vt"):
        for layer in range(3):
            expected = plain_interval(rows, lambda drawn, n=name, i=layer: mean(drawn, n, i), 5)
            assert astuple(summary["measures"][name][layer]) == expected
    for layer in range(3):
        expected = plain_interval(rows, lambda r, i=layer: math.log(mean(r, "s_vt", i) / mean(r, "s_vv", i)), 5)
        assert astuple(summary["log_vt_vv"][layer]) == expected
    for name, weights in (("per_token", (None, None)), ("together", ("image", "instruction"))):

        def share(rows, weights=weights):
            image, question = (
                sum(mean(rows, measure, layer, weight) for layer in range(3))
                for measure, weight in zip(("s_img", "s_ins"), weights, strict=True)
            )
            return image / question

        assert astuple(summary["image_to_instruction"][name]) == plain_interval(rows, share, 5)


def test_the_share_of_shallow_layers_is_of_all_layers():
    rows = [replace(row, found=row.found | {"s_sys": [0.5] * 3}) for row in rows_by_layer()]
    (shallow, _), claims = halves(3), ByLayer((0, 1, 2)).sum_up(rows, 4, 5)["hypotheses"]["H1"].claims

    def share(rows):
        each = [oracles.mean([row.found["s_vt"][layer] for row in rows]) for layer in range(3)]
        return sum(each[i] for i in shallow) / sum(each) - 0.5

    assert astuple(claims[1].number) == plain_interval(rows, share, 5)


def test_what_knockouts_take_is_a_mean_over_samples_not_over_images():
    experiment, generator, rows = ByWindow(width=1), np.random.default_rng(2), []
    for number, image in enumerate(SEEN):
        blocked = {}
        for path, layers in experiment.conditions(4):
            score, label, right = generator.uniform(0.1, 0.9), *generator.integers(2, size=2).tolist()
            blocked[f"{path} {','.join(map(str, layers))}"] = {"score": score, "label": label, "right": right}
        rows.append(StudyRow(f"{number}", (image,), right=number % 3 > 0, found={"blocked": blocked}))
    summary = experiment.sum_up(rows, n_layers=4, seed=6)

    def left(rows, path, layers, measure):
        return oracles.mean([row.found["blocked"][f"{path} {layers}"][measure] for row in rows])

    def lost(rows, path, layers, measure):
        whole = oracles.mean([float(row.right) for row in rows]) if measure == "right" else 1.0
        return whole - left(rows, path, layers, measure)

    vt, vv = "visual-textual", "intra-visual"
    for measure in ("score", "label", "right"):
        for end, layers in enumerate(("0,1", "2,3")):
            expected = plain_interval(rows, lambda r, at=layers, m=measure: left(r, vt, at, m), 6)
            if measure != "score":  # a share
                each = [(row.images[0], row.found["blocked"][f"{vt} {layers}"][measure]) for row in rows]
                expected = pytest.approx((left(rows, vt, layers, measure), *oracles.share_interval(each), 0))
            assert astuple(summary["consistency"][measure][vt][end]) == expected
        expected = plain_interval(rows, lambda r, m=measure: lost(r, vv, "2", m), 6)
        assert astuple(summary["lost"][measure][vv][2]) == expected
    ratio = plain_interval(rows, lambda r: math.log(lost(r, vv, "2", "score") / lost(r, vt, "2", "score")), 6)
    assert astuple(summary["log_vv_vt"]["score"][2]) == ratio


# -- hypotheses, on numbers made for them


def measured(vt, vv, n=30):
    """Samples whose flows are given by layer, with some noise; the last layer's S_vv is 0 as ever."""
    generator = np.random.default_rng(0)
    for i in range(n):
        noise = generator.uniform(0.9, 1.1, (5, len(vt)))
        rows = noise * np.array([[0.5] * len(vt), [0.01] * len(vt), [1.0] * len(vt), vv, vt])
        rows[3, -1] = 0
        found = dict(zip(("s_sys", "s_img", "s_ins", "s_vv", "s_vt"), rows.tolist(), strict=True))
        yield StudyRow(f"{i}", (f"{i}.png",), lengths={"system": 9, "image": 100, "instruction": 10}, found=found)


@pytest.mark.parametrize(
    ("vt", "vv", "judgements", "over"),
    [
        ([9, 8, 7, 1, 1, 1], [1, 1, 1, 5, 5, 5], ("holds", "holds"), 3),  # as the paper says
        ([1, 1, 1, 9, 8, 7], [5, 5, 5, 1, 1, 1], ("does not hold", "does not hold"), None),
        ([9, 8, 7, 1, 1, 1], [1, 1, 1, 1, 1, 1], ("holds", "undecided"), None),  # none leads in deep layers
    ],
)
def test_saliency_decides_the_hypotheses(vt, vv, judgements, over):
    summary = ByLayer().sum_up(list(measured(vt, vv)), n_layers=6, seed=0)
    assert tuple(summary["hypotheses"][name].judgement for name in ("H1", "H2")) == judgements
    assert summary["takes_over"] == over
    assert summary["image_to_instruction"]["per_token"].value == pytest.approx(0.01, rel=0.02)
    assert summary["image_to_instruction"]["together"].value == pytest.approx(0.1, rel=0.02)
    assert 5 not in summary["leaders"]


def test_one_layer_decides_nothing():
    summary = ByLayer((2,)).sum_up([replace(one, found={k: v[2:3] for k, v in one.found.items()}) for one in measured([9] * 6, [1] * 6)], 6, 0)  # fmt: skip  # noqa: E501
    assert summary["leaders"] == {2: "visual-textual"}
    assert {name: one.judgement for name, one in summary["hypotheses"].items()} == {
        "H1": "undecided",
        "H2": "undecided",
    }


def disturbed(left, experiment, n_layers, n=40):
    """Samples of which each condition leaves a share, as its path and first layer have it."""
    for i in range(n):
        blocked = {}
        for path, layers in experiment.conditions(n_layers):
            stays = float(i % 10 < 10 * left(path, layers[0]))
            blocked[f"{path} {','.join(map(str, layers))}"] = {"score": stays, "label": stays, "right": stays}
        yield StudyRow(f"{i}", (f"{i}.png",), right=True, found={"blocked": blocked})


def as_the_paper(path, first):
    deep = first >= 5
    return {
        "visual-textual": 0.9 if deep else 0.4,
        "intra-visual": 0.5 if deep else 0.8,
        "visual-random": 1.0,
    }[path]


def the_other_way(path, first):
    return as_the_paper(path, 9 - first) if path != "visual-random" else 1.0


@pytest.mark.parametrize(
    ("left", "judgement"), [(as_the_paper, "holds"), (the_other_way, "does not hold"), (lambda *_: 1.0, None)]
)
def test_knockouts_decide_the_hypotheses(left, judgement):
    experiment = ByWindow(width=1)
    summary = experiment.sum_up(list(disturbed(left, experiment, 10)), n_layers=10, seed=0)
    found = [summary["hypotheses"][name].judgement for name in ("H1", "H2")]
    assert found == ([judgement] * 2 if judgement else ["does not hold", "undecided"])
    if judgement:
        d = [ratio.value for ratio in summary["log_vv_vt"]["score"]]
        deep, shallow = math.log(0.5 / 0.1), math.log(0.2 / 0.6)
        expected = [shallow] * 5 + [deep] * 5 if left is as_the_paper else [deep] * 5 + [shallow] * 5
        assert d == pytest.approx(expected)
    else:
        undefined = {"value": None, "low": None, "high": None, "undefined": 1.0}
        assert summary["log_vv_vt"]["score"][0].to_dict() == undefined


def test_a_window_of_the_last_layer_alone_decides_nothing():
    """There E_vv is 0 whatever the model does."""

    def left(path, first):
        return 1.0 if path == "intra-visual" and first == 9 else as_the_paper(path, first)

    experiment = ByWindow(width=1)
    summary = experiment.sum_up(list(disturbed(left, experiment, 10)), n_layers=10, seed=0)
    assert summary["log_vv_vt"]["score"][9].value == -math.inf
    assert summary["hypotheses"]["H2"].judgement == "holds"
    assert "layers 5-8" in summary["hypotheses"]["H2"].claims[0].claim


def test_windows():
    assert ByWindow(width=5).windows(12) == [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9), (10, 11)]
    with pytest.raises(ValueError, match="windows must be 1, 2 or 5, got 3"):
        ByWindow(width=3).settings(10)
