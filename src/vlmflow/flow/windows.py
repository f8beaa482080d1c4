"""Figures 4 and 5: what the prediction loses when a flow is blocked in some layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vlmflow.core.statistics import Resampled, clusters_of, log_ratio
from vlmflow.flow.hypotheses import Claim, judged
from vlmflow.flow.layers import Layers, halves, in_words, named_layers
from vlmflow.flow.rows import StudyRow
from vlmflow.flow.verdict import figure_title, in_text, judgements, opening
from vlmflow.records.table import Table

if TYPE_CHECKING:
    from vlmflow.flow.prediction import Prediction
    from vlmflow.models import VLM

Condition = tuple[str, Layers]  # a path of PATHS, and where it is blocked
Statistic = Callable[[np.ndarray], np.ndarray]

ENDS = 5  # layers at either end that Figure 4 blocks; half of a model that has fewer than ten
WIDTHS = (1, 2, 5)
MEASURES = ("score", "label", "right")
PATHS = ("visual-textual", "intra-visual", "visual-random")
_VT, _VV, _RANDOM = PATHS
_SCORE = MEASURES.index("score")
_WHOLE = 0  # column of what is not disturbed


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

        before, drawn = prediction.logits, random_positions(prediction.layout, seed=seed)
        targets = {_VT: "instruction", _VV: "image", _RANDOM: drawn}
        blocked = {}
        for path, layers in self.conditions(vlm.n_layers):
            with attach(vlm.model, taps=[Knockout("image", targets[path], layers)]):
                after = next_token(vlm, prediction.inputs)
            likeliest = int(after.argmax())
            blocked[_key(path, layers)] = {
                "score": float(score_consistency(before[None], after[None])[0]),
                "label": float(label_consistency([int(before.argmax())], [likeliest])[0]),
                "right": float(likeliest == prediction.target),
            }
        return {"blocked": blocked}

    def sum_up(self, rows: Sequence[StudyRow], n_layers: int, seed: int) -> dict[str, Any]:
        """Means, E and D by each measure, and the paper's hypotheses by score consistency."""
        conditions, windows, both_ends = self.conditions(n_layers), self.windows(n_layers), ends(n_layers)
        values = np.stack([_columns(row, conditions) for row in rows])
        means = Resampled.means(values, clusters_of([row.images for row in rows]), seed)
        columns = _Columns(conditions)
        return {
            "consistency": {
                measure: {
                    path: [means.interval(partial(columns.left, n, path, end)).to_dict() for end in both_ends]
                    for path in (_VT, _RANDOM)
                }
                for n, measure in enumerate(MEASURES)
            },
            "lost": {
                measure: {
                    path: [means.interval(partial(columns.lost, n, path, [window])).to_dict() for window in windows]
                    for path in (_VT, _VV)
                }
                for n, measure in enumerate(MEASURES)
            },
            "log_vv_vt": {
                measure: [means.interval(partial(columns.ratio, n, [window])).to_dict() for window in windows]
                for n, measure in enumerate(MEASURES)
            },
            "hypotheses": judged(_claims(means, columns, windows, n_layers)),
        }

    def verdict(self, summary: Mapping[str, Any]) -> str:
        """What blocking costs where, and whether the hypotheses hold."""
        first, last = (in_words(end) for end in summary["settings"]["ends"])
        right = in_text(summary["right"])
        left = [
            [measure, path, *map(in_text, summary["consistency"][measure][path])]
            for measure in MEASURES
            for path in (_VT, _RANDOM)
        ]
        lost, ratio = summary["lost"], summary["log_vv_vt"]
        by_window = [
            [
                in_words(window).partition(" ")[2],
                *(in_text(lost[measure][path][i]) for measure in ("score", "label") for path in (_VV, _VT)),
                *(in_text(ratio[measure][i]) for measure in MEASURES),
            ]
            for i, window in enumerate(summary["settings"]["examined"])
        ]
        header = ["layers", *(f"E_{n} ({m})" for m in ("score", "label") for n in ("vv", "vt"))]
        parts = [
            *opening(summary),
            *judgements(summary),
            "## What is left when a flow is blocked\n\n"
            "score: Jaccard similarity of the five likeliest next tokens; label: the likeliest stays; right: the "
            f"likeliest begins the right answer, which without a disturbance it does for {right}.\n\n"
            + Table(["measure", "flow", first, last], left).markdown().rstrip(),
            "## By window\n\nE is what is lost, D = log(E_vv / E_vt).\n\n"
            + Table([*header, *(f"D ({measure})" for measure in MEASURES)], by_window).markdown().rstrip(),
        ]
        return "\n\n".join(parts) + "\n"

    def figures(self, summary: Mapping[str, Any], out: Path) -> list[str]:
        """Draw Figures 4 and 5."""
        from vlmflow.figures.analysis import Curve, consistencies, log_ratios

        settings, kept, title = summary["settings"], summary["consistency"], f"{figure_title(summary)}, 95 % intervals"
        panels = {
            f"{measure} consistency": {f"{path} flow": Curve.of(left) for path, left in kept[measure].items()}
            for measure in ("label", "score")
        }
        first, last = (len(end) for end in settings["ends"])
        consistencies(out / "consistency", [f"first {first} layers", f"last {last} layers"], panels, title)
        lost = {f"{path} flow": Curve.of(by_window) for path, by_window in summary["lost"]["score"].items()}
        places = ["-".join(map(str, dict.fromkeys((window[0], window[-1])))) for window in settings["examined"]]
        log_ratios(out / "windows", places, lost, Curve.of(summary["log_vv_vt"]["score"]), title)
        return ["consistency", "windows"]


def ends(n_layers: int) -> list[Layers]:
    """The first and the last layers that Figure 4 blocks."""
    count = min(ENDS, n_layers // 2)
    return [tuple(range(count)), tuple(range(n_layers - count, n_layers))]


def _key(path: str, layers: Layers) -> str:
    """A condition's name in a row."""
    return f"{path} {','.join(map(str, layers))}"


def _columns(row: StudyRow, conditions: Sequence[Condition]) -> np.ndarray:
    """One sample's (measure, column): undisturbed, then each condition."""
    blocked = [row.found["blocked"][_key(*condition)] for condition in conditions]
    whole = {"score": 1.0, "label": 1.0, "right": float(row.right)}
    return np.array([[whole[measure], *(left[measure] for left in blocked)] for measure in MEASURES])


class _Columns:
    """Statistics of means (..., measure, column), whose columns are ``_columns``."""

    def __init__(self, conditions: Sequence[Condition]) -> None:
        self._column = {condition: 1 + i for i, condition in enumerate(conditions)}

    def left(self, measure: int, path: str, layers: Layers, means: np.ndarray) -> np.ndarray:
        """What a knock-out leaves."""
        return means[..., measure, self._column[path, layers]]

    def lost(self, measure: int, path: str, windows: Sequence[Layers], means: np.ndarray) -> np.ndarray:
        """E: what it takes away, summed over windows."""
        columns = [self._column[path, window] for window in windows]
        return (means[..., measure, _WHOLE, None] - means[..., measure, columns]).sum(-1)

    def ratio(self, measure: int, windows: Sequence[Layers], means: np.ndarray) -> np.ndarray:
        """D of windows together."""
        return log_ratio(*(self.lost(measure, path, windows, means) for path in (_VV, _VT)))


def _claims(means: Resampled, columns: _Columns, windows: Sequence[Layers], n_layers: int) -> dict[str, list[Claim]]:
    """The hypotheses by score consistency, the measure of appendix D.

    Nothing reads the image tokens of the last layer: a window of that layer alone says nothing of intra-visual flow.
    """
    first, last = ends(n_layers)
    in_first, in_last = in_words(first), in_words(last)
    shallow, deep = ([windows[i] for i in half] for half in halves(len(windows)))
    deep = [window for window in deep if window != (n_layers - 1,)]

    def left(path: str, layers: Layers) -> Statistic:
        return partial(columns.left, _SCORE, path, layers)

    def ratio(where: Sequence[Layers]) -> Statistic:
        return partial(columns.ratio, _SCORE, where)

    def claim(text: str, more: Statistic, less: Statistic) -> Claim:
        return Claim(text, means.interval(lambda m: more(m) - less(m)))

    hypotheses = {
        "H1": [
            claim(
                f"blocking visual-textual flow in {in_last} leaves more score consistency than in {in_first}",
                left(_VT, last),
                left(_VT, first),
            ),
            claim(
                f"in {in_first}, blocking flow to random tokens leaves more than blocking visual-textual flow",
                left(_RANDOM, first),
                left(_VT, first),
            ),
        ],
        "H2": [],
    }
    if deep:
        upper, lower = (in_words([layer for window in part for layer in window]) for part in (shallow, deep))
        hypotheses["H2"] = [
            Claim(f"D is above 0 in {lower}", means.interval(ratio(deep))),
            claim(f"D is larger in {lower} than in {upper}", ratio(deep), ratio(shallow)),
        ]
    return hypotheses
