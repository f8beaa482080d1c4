"""Figures 4 and 5: what the prediction loses when a flow is blocked in some layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vlmflow.core.statistics import Resampled, clusters_of, log_ratio
from vlmflow.engine import attach
from vlmflow.flow.consistency import label_consistency, score_consistency
from vlmflow.flow.findings import Finding
from vlmflow.flow.knockout import Knockout, random_positions
from vlmflow.flow.study import Asked
from vlmflow.flow.verdict import Claim, halves, named_layers, numbers, record, shown, span, told
from vlmflow.models import VLM
from vlmflow.records.table import Table

Layers = tuple[int, ...]
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
    """Consistency under knock-outs: of both flows in windows of ``width`` layers, and at the model's two ends.

    ``layers`` are cut into windows, all if none is named; the last one may be narrower.
    """

    layers: Layers = ()
    width: int = 2
    name = "knockout"

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

    def look(self, vlm: VLM, asked: Asked, seed: int) -> dict[str, Any]:
        """What each condition leaves of one sample's prediction, by each measure."""
        blocked = {}
        for path, layers in self.conditions(vlm.n_layers):
            logits = _blocked(vlm, asked, path, layers, seed)
            blocked[_key(path, layers)] = {
                "score": float(score_consistency(asked.logits[None], logits[None])[0]),
                "label": float(label_consistency([int(asked.logits.argmax())], [int(logits.argmax())])[0]),
                "right": float(int(logits.argmax()) == asked.target),
            }
        return {"blocked": blocked}

    def sum_up(self, findings: Sequence[Finding], n_layers: int, seed: int) -> dict[str, Any]:
        """Means, E and D by each measure, and the paper's hypotheses by score consistency."""
        conditions, windows, both_ends = self.conditions(n_layers), self.windows(n_layers), ends(n_layers)
        values = np.stack([_columns(finding, conditions) for finding in findings])
        means = Resampled.means(values, clusters_of([finding.images for finding in findings]), seed)
        columns = _Columns(conditions)
        return {
            "consistency": {
                measure: {
                    path: [numbers(means.interval(partial(columns.left, n, path, end))) for end in both_ends]
                    for path in (_VT, _RANDOM)
                }
                for n, measure in enumerate(MEASURES)
            },
            "lost": {
                measure: {
                    path: [numbers(means.interval(partial(columns.lost, n, path, [own]))) for own in windows]
                    for path in (_VT, _VV)
                }
                for n, measure in enumerate(MEASURES)
            },
            "log_vv_vt": {
                measure: [numbers(means.interval(partial(columns.ratio, n, [own]))) for own in windows]
                for n, measure in enumerate(MEASURES)
            },
            "hypotheses": record(_claims(means, columns, windows, n_layers)),
        }

    def verdict(self, summary: Mapping[str, Any]) -> str:
        """What blocking costs where, and whether the hypotheses hold."""
        opening, counts, *hypotheses = told(summary)
        first, last = (span(end) for end in summary["settings"]["ends"])
        left = [
            [measure, path, *map(shown, summary["consistency"][measure][path])]
            for measure in MEASURES
            for path in (_VT, _RANDOM)
        ]
        lost, ratio = summary["lost"], summary["log_vv_vt"]
        by_window = [
            [
                span(window).partition(" ")[2],
                *(shown(lost[measure][path][i]) for measure in ("score", "label") for path in (_VV, _VT)),
                *(shown(ratio[measure][i]) for measure in MEASURES),
            ]
            for i, window in enumerate(summary["settings"]["examined"])
        ]
        header = ["layers", *(f"E_{n} ({m})" for m in ("score", "label") for n in ("vv", "vt"))]
        parts = [
            opening,
            counts,
            *hypotheses,
            "## What is left when a flow is blocked\n\n"
            "score: Jaccard similarity of the five likeliest next tokens; label: the likeliest stays; right: the "
            f"likeliest begins the right answer, which without a disturbance it does for {shown(summary['right'])}.\n\n"
            + Table(["measure", "flow", first, last], left).markdown().rstrip(),
            "## By window\n\nE is what is lost, D = log(E_vv / E_vt).\n\n"
            + Table([*header, *(f"D ({measure})" for measure in MEASURES)], by_window).markdown().rstrip(),
        ]
        return "\n\n".join(parts) + "\n"


def ends(n_layers: int) -> list[Layers]:
    """The first and the last layers that Figure 4 blocks."""
    count = min(ENDS, n_layers // 2)
    return [tuple(range(count)), tuple(range(n_layers - count, n_layers))]


@torch.no_grad()
def _blocked(vlm: VLM, asked: Asked, path: str, layers: Layers, seed: int) -> Float[Tensor, " vocab"]:
    """The prediction with a path blocked."""
    targets = {_VT: "instruction", _VV: "image"}
    target = targets[path] if path in targets else random_positions(asked.layout, seed=seed)
    with attach(vlm.model, taps=[Knockout("image", target, layers)]):
        return vlm.model(**asked.inputs, use_cache=False, logits_to_keep=1).logits[0, -1].float()


def _key(path: str, layers: Layers) -> str:
    """A condition's name in a row."""
    return f"{path} {','.join(map(str, layers))}"


def _columns(finding: Finding, conditions: Sequence[Condition]) -> np.ndarray:
    """One sample's (measure, column): undisturbed, then each condition."""
    blocked = [finding.found["blocked"][_key(*condition)] for condition in conditions]
    whole = {"score": 1.0, "label": 1.0, "right": float(finding.right)}
    return np.array([[whole[measure], *(own[measure] for own in blocked)] for measure in MEASURES])


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
                f"blocking visual-textual flow in {span(last)} leaves more score consistency than in {span(first)}",
                left(_VT, last),
                left(_VT, first),
            ),
            claim(
                f"in {span(first)}, blocking flow to random tokens leaves more than blocking visual-textual flow",
                left(_RANDOM, first),
                left(_VT, first),
            ),
        ],
        "H2": [],
    }
    if deep:
        upper, lower = (span([layer for window in part for layer in window]) for part in (shallow, deep))
        hypotheses["H2"] = [
            Claim(f"D is above 0 in {lower}", means.interval(ratio(deep))),
            claim(f"D is larger in {lower} than in {upper}", ratio(deep), ratio(shallow)),
        ]
    return hypotheses
