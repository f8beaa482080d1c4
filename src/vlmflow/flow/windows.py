"""Figures 4 and 5: what the prediction loses when a flow is blocked in some layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vlmflow.core.statistics import Interval, Resampled, Statistic, clusters_of, log_ratio, share
from vlmflow.flow.layers import Layers, halves, in_words, named_layers
from vlmflow.flow.verdict import claim, judged, judgements, title_with_intervals
from vlmflow.records.schema import Claim, Estimate, StudyRow, StudySummary
from vlmflow.records.table import Table

if TYPE_CHECKING:
    from vlmflow.flow.prediction import Prediction
    from vlmflow.models import VLM

Condition = tuple[str, Layers]  # a path of PATHS, and where it is blocked

ENDS = 5  # layers at either end that Figure 4 blocks; half of a model that has fewer than ten
WIDTHS = (1, 2, 5)
MEASURES = ("score", "label", "right")
PATHS = ("visual-textual", "intra-visual", "visual-random")
_VT, _VV, _RANDOM = PATHS


@dataclass(frozen=True, kw_only=True)
class KnockoutSummary(StudySummary):
    """What ``vlmflow flow knockout`` sums up, by measure, then by flow.

    ``consistency`` is what is left at the settings' two ``ends``; ``lost`` (E) and ``log_vv_vt`` (D) stand by window,
    as the settings' ``examined`` has them.
    """

    consistency: dict[str, dict[str, list[Estimate]]]
    lost: dict[str, dict[str, list[Estimate]]]
    log_vv_vt: dict[str, list[Estimate]]


@dataclass(frozen=True)
class ByWindow:
    """What the prediction loses when a flow is blocked in some layers (Eq. 7, Figures 4 and 5).

    Both flows are blocked in windows of ``width`` layers, and at the model's two ends. ``layers`` are cut into windows,
    all if none is named; the last one may be narrower.
    """

    layers: Layers = field(default=(), metadata={"help": "Layers, as 0-4,8; default: all."})
    width: int = field(
        default=2, metadata={"help": "How many layers are blocked together: 1, 2 or 5.", "option": "--windows"}
    )
    name: ClassVar[str] = "knockout"
    summary_type: ClassVar[type[StudySummary]] = KnockoutSummary

    def settings(self, n_layers: int) -> dict[str, Any]:
        """The windows, the ends, and how flow is blocked.

        Raises:
            ValueError: a layer that the model has not, or a width that is none of ``WIDTHS``.
        """
        if self.width not in WIDTHS:
            raise ValueError(f"windows must be {', '.join(map(str, WIDTHS[:-1]))} or {WIDTHS[-1]}, got {self.width}")
        return {
            "examined": [list(window) for window in self.windows(n_layers)],
            "ends": [list(end) for end in ends(n_layers)],
            "how": "zero",
            "top": 5,
        }

    def windows(self, n_layers: int) -> list[Layers]:
        """The layers that are blocked together."""
        layers = named_layers(self.layers, n_layers)
        return [layers[start : start + self.width] for start in range(0, len(layers), self.width)]

    def conditions(self, n_layers: int) -> list[Condition]:
        """What is blocked in turn, and where."""
        at_ends = [(path, end) for path in (_VT, _RANDOM) for end in ends(n_layers)]
        in_windows = [(path, window) for window in self.windows(n_layers) for path in (_VT, _VV)]
        return list(dict.fromkeys(at_ends + in_windows))

    def examine(self, vlm: VLM, prediction: Prediction, seed: int) -> dict[str, Any]:
        """What each condition leaves of one sample's prediction, by each measure."""
        from vlmflow.engine import attach
        from vlmflow.flow.consistency import label_consistency, score_consistency
        from vlmflow.flow.knockout import Knockout, random_positions
        from vlmflow.flow.prediction import next_token

        before = prediction.logits
        targets = {_VT: "instruction", _VV: "image", _RANDOM: random_positions(prediction.layout, seed=seed)}
        blocked = {}
        for path, layers in self.conditions(vlm.n_layers):
            with attach(vlm.model, taps=[Knockout("image", targets[path], layers)]):
                (after,) = next_token(vlm.model, prediction.inputs)
            likeliest = int(after.argmax())
            blocked[_key(path, layers)] = {
                "score": float(score_consistency(before[None], after[None])[0]),
                "label": float(label_consistency([int(before.argmax())], [likeliest])[0]),
                "right": float(likeliest == prediction.target),
            }
        return {"blocked": blocked}

    def sum_up(self, rows: Sequence[StudyRow], n_layers: int, seed: int) -> dict[str, Any]:
        """Means, E and D by each measure, and the paper's hypotheses by score consistency."""
        conditions, windows = self.conditions(n_layers), self.windows(n_layers)
        values = np.stack([_values(row, conditions) for row in rows])
        images = clusters_of([row.images for row in rows])
        means = Resampled.means(values, images, seed)
        left = {measure: _Left(n, conditions) for n, measure in enumerate(MEASURES)}

        def stays(measure: str, statistic: Statistic) -> Interval:
            return means.interval(statistic) if measure == "score" else share(statistic(values), images)

        return {
            "consistency": {
                measure: {
                    path: [stays(measure, of.left(path, end)) for end in ends(n_layers)] for path in (_VT, _RANDOM)
                }
                for measure, of in left.items()
            },
            "lost": {
                measure: {path: [means.interval(of.lost(path, [window])) for window in windows] for path in (_VT, _VV)}
                for measure, of in left.items()
            },
            "log_vv_vt": {
                measure: [means.interval(of.ratio([window])) for window in windows] for measure, of in left.items()
            },
            "hypotheses": {
                name: judged(claims) for name, claims in _claims(means, left["score"], windows, n_layers).items()
            },
        }

    def verdict(self, summary: KnockoutSummary) -> list[str]:
        """What blocking costs where, and whether the hypotheses hold."""
        first, last = (in_words(end) for end in summary.settings["ends"])
        left = [
            [measure, path, *(interval.text() for interval in summary.consistency[measure][path])]
            for measure in MEASURES
            for path in (_VT, _RANDOM)
        ]
        shown = {
            f"E_{flow} ({measure})": summary.lost[measure][path]
            for measure in ("score", "label")
            for flow, path in (("vv", _VV), ("vt", _VT))
        }
        shown |= {f"D ({measure})": summary.log_vv_vt[measure] for measure in MEASURES}
        by_window = [
            [in_words(window).partition(" ")[2], *(interval.text() for interval in intervals)]
            for window, *intervals in zip(summary.settings["examined"], *shown.values(), strict=True)
        ]
        return [
            *judgements(summary),
            "## What is left when a flow is blocked\n\n"
            "score: Jaccard similarity of the five likeliest next tokens; label: the likeliest stays; right: the "
            f"likeliest begins the right answer, which without a disturbance it does for {summary.right.text()}.\n\n"
            + Table(["measure", "flow", first, last], left).markdown().rstrip(),
            "## By window\n\nE is what is lost, D = log(E_vv / E_vt).\n\n"
            + Table(["layers", *shown], by_window).markdown().rstrip(),
        ]

    def figures(self, summary: KnockoutSummary, out: Path) -> list[str]:
        """Draw Figures 4 and 5."""
        from vlmflow.figures.analysis import consistencies, log_ratios

        title, (first, last) = title_with_intervals(summary), summary.settings["ends"]
        panels = {
            f"{measure} consistency": {f"{path} flow": left for path, left in summary.consistency[measure].items()}
            for measure in ("label", "score")
        }
        places = [f"first {len(first)} layers", f"last {len(last)} layers"]
        consistencies(out / "consistency", places, panels, title)
        lost = {f"{path} flow": by_window for path, by_window in summary.lost["score"].items()}
        places = ["-".join(map(str, dict.fromkeys((window[0], window[-1])))) for window in summary.settings["examined"]]
        log_ratios(out / "windows", places, lost, summary.log_vv_vt["score"], title)
        return ["consistency", "windows"]


def ends(n_layers: int) -> list[Layers]:
    """The first and the last layers that Figure 4 blocks."""
    count = min(ENDS, n_layers // 2)
    return [tuple(range(count)), tuple(range(n_layers - count, n_layers))]


def _key(path: str, layers: Layers) -> str:
    """A condition's name in a row."""
    return f"{path} {','.join(map(str, layers))}"


def _values(row: StudyRow, conditions: Sequence[Condition]) -> np.ndarray:
    """One sample's (measure, column): undisturbed, then each condition."""
    blocked = [row.found["blocked"][_key(*condition)] for condition in conditions]
    whole = {"score": 1.0, "label": 1.0, "right": float(row.right)}
    return np.array([[whole[measure], *(left[measure] for left in blocked)] for measure in MEASURES])


class _Left:
    """Statistics of one measure's means, given as (..., measure, column) with the columns of ``_values``."""

    def __init__(self, measure: int, conditions: Sequence[Condition]) -> None:
        self._measure = measure
        self._column = {condition: 1 + i for i, condition in enumerate(conditions)}

    def left(self, path: str, layers: Layers) -> Statistic:
        """What a knock-out leaves."""
        return lambda means: means[..., self._measure, self._column[path, layers]]

    def lost(self, path: str, windows: Sequence[Layers]) -> Statistic:
        """E: what it takes away, summed over windows."""
        columns = [self._column[path, window] for window in windows]
        return lambda means: (means[..., self._measure, 0, None] - means[..., self._measure, columns]).sum(-1)

    def ratio(self, windows: Sequence[Layers]) -> Statistic:
        """D of windows together."""
        over, under = self.lost(_VV, windows), self.lost(_VT, windows)
        return lambda means: log_ratio(over(means), under(means))


def _claims(means: Resampled, score: _Left, windows: Sequence[Layers], n_layers: int) -> dict[str, list[Claim]]:
    """The hypotheses by score consistency, the measure of appendix D.

    Nothing reads the image tokens of the last layer: a window of that layer alone says nothing of intra-visual flow.
    """
    first, last = ends(n_layers)
    in_first, in_last = in_words(first), in_words(last)
    shallow, deep = ([windows[i] for i in half] for half in halves(len(windows)))
    deep = [window for window in deep if window != (n_layers - 1,)]

    def larger(text: str, more: Statistic, less: Statistic) -> Claim:
        return claim(text, means.interval(lambda m: more(m) - less(m)))

    hypotheses = {
        "H1": [
            larger(
                f"blocking visual-textual flow in {in_last} leaves more score consistency than in {in_first}",
                score.left(_VT, last),
                score.left(_VT, first),
            ),
            larger(
                f"in {in_first}, blocking flow to random tokens leaves more than blocking visual-textual flow",
                score.left(_RANDOM, first),
                score.left(_VT, first),
            ),
        ],
        "H2": [],
    }
    if deep:
        upper, lower = (in_words([layer for window in part for layer in window]) for part in (shallow, deep))
        hypotheses["H2"] = [
            claim(f"D is above 0 in {lower}", means.interval(score.ratio(deep))),
            larger(f"D is larger in {lower} than in {upper}", score.ratio(deep), score.ratio(shallow)),
        ]
    return hypotheses
