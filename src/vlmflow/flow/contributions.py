"""Figures 2, 3 and 9: what each segment contributes to the answer, layer by layer, and where images send theirs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vlmflow.core.statistics import Interval, Resampled, clusters_of, log_ratio
from vlmflow.flow.layers import Layers, halves, in_words, named_layers
from vlmflow.flow.verdict import claim, figure_title, judged, judgements, title_with_intervals
from vlmflow.records.schema import Claim, Estimate, StudyRow, StudySummary
from vlmflow.records.table import Table

if TYPE_CHECKING:
    from vlmflow.flow.prediction import Prediction
    from vlmflow.models import VLM

MEASURES = ("s_sys", "s_img", "s_ins", "s_vv", "s_vt")
_IMG, _INS, _VV, _VT, _ALL_IMG, _ALL_INS = 1, 2, 3, 4, 5, 6  # of MEASURES, then two sums over tokens


@dataclass(frozen=True, kw_only=True)
class SaliencySummary(StudySummary):
    """What ``vlmflow flow saliency`` sums up, by layer as the settings' ``examined`` names them.

    ``leaders`` says which flow leads in a layer, by the sign of ``log_vt_vv``; ``takes_over`` is the layer from which
    intra-visual flow does for good. ``image_to_instruction`` has S_img / S_ins over these layers, ``per_token`` and of
    all tokens ``together``.
    """

    measures: dict[str, list[Estimate]]
    log_vt_vv: list[Estimate]
    leaders: dict[int, str]
    takes_over: int | None
    image_to_instruction: dict[str, Estimate]


@dataclass(frozen=True)
class ByLayer:
    """What system, image and instruction tokens contribute, layer by layer (Eq. 1 to 6, Figures 2, 3 and 9).

    Looked at are the five measures of saliency in each of ``layers``, all if none is named.
    """

    layers: Layers = field(default=(), metadata={"help": "Layers, as 0-4,8; default: all."})
    name: ClassVar[str] = "saliency"
    summary_type: ClassVar[type[StudySummary]] = SaliencySummary

    def settings(self, n_layers: int) -> dict[str, Any]:
        """The layers, and which quantity it is."""
        return {"examined": list(named_layers(self.layers, n_layers)), "form": "paper", "over": "first"}

    def examine(self, vlm: VLM, prediction: Prediction, seed: int) -> dict[str, Any]:
        """The measures of one sample, by layer; null for a segment without tokens."""
        from vlmflow.flow.saliency import saliency

        result = saliency(vlm.model, prediction.inputs, prediction.target)
        layers = list(named_layers(self.layers, vlm.n_layers))
        by_layer = {name: getattr(result, name)[layers, 0].tolist() for name in MEASURES}
        return {
            "loss": float(result.loss[0]),
            **{name: [None if math.isnan(v) else v for v in values] for name, values in by_layer.items()},
        }

    def sum_up(self, rows: Sequence[StudyRow], n_layers: int, seed: int) -> dict[str, Any]:
        """Means, which flow leads in which layer, and the paper's hypotheses.

        Nothing reads the image tokens of the last layer, so that S_vv is 0 there; it is left out where flows are
        weighed against each other.
        """
        layers = named_layers(self.layers, n_layers)
        images = clusters_of([row.images for row in rows])
        means = Resampled.means(np.array([_columns(row) for row in rows]), images, seed)
        ratios = [means.interval(lambda m, i=i: _vt_over_vv(m, [i])) for i in range(len(layers))]
        leaders = {layer: _leader(ratio) for layer, ratio in zip(layers, ratios, strict=True) if layer < n_layers - 1}
        shallow, deep = halves(len(layers))
        deep = [i for i in deep if layers[i] in leaders]
        hypotheses: dict[str, list[Claim]] = {"H1": [], "H2": []}
        if deep:
            first, last = (in_words([layers[i] for i in part]) for part in (shallow, deep))
            claims = {
                f"visual-textual flow leads in {first}: log(S_vt / S_vv)": lambda m: _vt_over_vv(m, shallow),
                f"most visual-textual flow is in {first}: its share of S_vt, less a half": lambda m: (
                    m[..., _VT, shallow].sum(-1) / m[..., _VT, :].sum(-1) - 0.5
                ),
                f"intra-visual flow leads in {last}: log(S_vv / S_vt)": lambda m: -_vt_over_vv(m, deep),
                f"it gains on visual-textual flow from {first} to {last}: difference of log(S_vv / S_vt)": lambda m: (
                    _vt_over_vv(m, shallow) - _vt_over_vv(m, deep)
                ),
            }
            weighed = [claim(text, means.interval(statistic)) for text, statistic in claims.items()]
            hypotheses = {"H1": weighed[:2], "H2": weighed[2:]}
        return {
            "measures": {
                name: [means.interval(lambda m, n=n, i=i: m[..., n, i]) for i in range(len(layers))]
                for n, name in enumerate(MEASURES)
            },
            "log_vt_vv": ratios,
            "leaders": leaders,
            "takes_over": takes_over(leaders),
            "image_to_instruction": {
                name: means.interval(lambda m, a=a, b=b: m[..., a, :].sum(-1) / m[..., b, :].sum(-1))
                for name, a, b in (("per_token", _IMG, _INS), ("together", _ALL_IMG, _ALL_INS))
            },
            "hypotheses": {name: judged(claims) for name, claims in hypotheses.items()},
        }

    def verdict(self, summary: SaliencySummary) -> list[str]:
        """Which flow leads where, what images contribute, and whether the hypotheses hold."""
        leads = []
        for flow in ("visual-textual", "intra-visual", "neither"):
            where = [layer for layer, leader in summary.leaders.items() if leader == flow]
            leads.append(f"- {flow}: {in_words(where) if where else 'none'}")
        shift = (
            f"Intra-visual flow takes over for good in layer {summary.takes_over}."
            if summary.takes_over is not None
            else "Nowhere does intra-visual flow take over for good from visual-textual flow."
        )
        per_token, together = (summary.image_to_instruction[name] for name in ("per_token", "together"))
        columns = [*(summary.measures[name] for name in MEASURES), summary.log_vt_vv]
        rows = [
            [layer, *map(Interval.text, intervals)]
            for layer, *intervals in zip(summary.settings["examined"], *columns, strict=True)
        ]
        return [
            "## Which flow leads\n\nWhere the interval of log(S_vt / S_vv) leaves 0; the last layer is left "
            "out, as nothing reads its image tokens:\n\n" + "\n".join(leads) + f"\n\n{shift}",
            f"## What images contribute\n\nAn image token's importance is {per_token.text('.2%')} of an instruction "
            "token's (S_img / S_ins over these layers); that of all image tokens together is "
            f"{together.text('.1%')} of the instruction's.",
            *judgements(summary),
            "## By layer\n\n" + Table(["layer", *MEASURES, "log(S_vt / S_vv)"], rows).markdown().rstrip(),
        ]

    def figures(self, summary: SaliencySummary, out: Path) -> list[str]:
        """Draw Figures 2, 3 and 9."""
        from vlmflow.figures.analysis import by_layer, lengths

        layers, title = summary.settings["examined"], title_with_intervals(summary)
        contributions = {
            "system tokens (S_sys)": "s_sys",
            "image tokens (S_img)": "s_img",
            "instruction tokens (S_ins)": "s_ins",
        }
        flows = {"visual-textual (S_vt)": "s_vt", "intra-visual (S_vv)": "s_vv"}
        for stem, names in {"contributions": contributions, "flows": flows}.items():
            curves = {label: summary.measures[name] for label, name in names.items()}
            by_layer(out / stem, layers, curves, "importance (mean over samples)", title)
        lengths(out / "lengths", summary.lengths, figure_title(summary))
        return ["contributions", "flows", "lengths"]


def takes_over(leaders: Mapping[int, str]) -> int | None:
    """The layer in which intra-visual flow leads, after visual-textual flow did for the last time; None: nowhere."""
    before = max((layer for layer, leader in leaders.items() if leader == "visual-textual"), default=None)
    after = [layer for layer, leader in leaders.items() if leader == "intra-visual"]
    return None if before is None else min((layer for layer in after if layer > before), default=None)


def _columns(row: StudyRow) -> np.ndarray:
    """One sample's measures, then the sums over image and instruction tokens: (measure, layer)."""
    values = np.array([row.found[name] for name in MEASURES], float)  # None becomes nan
    sums = [values[_IMG] * row.lengths["image"], values[_INS] * row.lengths["instruction"]]
    return np.stack([*values, *sums])


def _vt_over_vv(means: np.ndarray, layers: Sequence[int]) -> np.ndarray:
    """log(S_vt / S_vv) of some layers together."""
    return log_ratio(means[..., _VT, layers].sum(-1), means[..., _VV, layers].sum(-1))


def _leader(vt_over_vv: Interval) -> str:
    if vt_over_vv.low > 0:
        return "visual-textual"
    return "intra-visual" if vt_over_vv.high < 0 else "neither"
