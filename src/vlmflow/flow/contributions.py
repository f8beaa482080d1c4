"""Figures 2, 3 and 9: what each segment contributes to the answer, layer by layer, and where images send theirs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmflow.core.statistics import Interval, Resampled, clusters_of, log_ratio
from vlmflow.flow.findings import Finding
from vlmflow.flow.saliency import saliency
from vlmflow.flow.study import Asked
from vlmflow.flow.verdict import (
    Claim,
    halves,
    named_layers,
    numbers,
    record,
    shown,
    span,
    told,
)
from vlmflow.models import VLM
from vlmflow.records.table import Table

MEASURES = ("s_sys", "s_img", "s_ins", "s_vv", "s_vt")
_IMG, _INS, _VV, _VT, _ALL_IMG, _ALL_INS = 1, 2, 3, 4, 5, 6  # of MEASURES, then two sums over tokens


@dataclass(frozen=True)
class ByLayer:
    """The five measures of saliency in each of ``layers``, all if none is named."""

    layers: tuple[int, ...] = ()
    name = "saliency"

    def settings(self, n_layers: int) -> dict[str, Any]:
        """The layers, and which quantity it is."""
        return {"examined": list(named_layers(self.layers, n_layers)), "form": "paper", "over": "first"}

    def look(self, vlm: VLM, asked: Asked, seed: int) -> dict[str, Any]:
        """The measures of one sample, by layer; null for a segment without tokens."""
        found = saliency(vlm.model, asked.inputs, asked.target)
        layers = list(named_layers(self.layers, vlm.n_layers))
        values = {name: getattr(found, name)[layers, 0].tolist() for name in MEASURES}
        return {
            "loss": float(found.loss[0]),
            **{name: [None if math.isnan(v) else v for v in own] for name, own in values.items()},
        }

    def sum_up(self, findings: Sequence[Finding], n_layers: int, seed: int) -> dict[str, Any]:
        """Means, which flow leads in which layer, and the paper's hypotheses.

        Nothing reads the image tokens of the last layer, so that S_vv is 0 there; it is left out where flows are
        weighed against each other.
        """
        layers = named_layers(self.layers, n_layers)
        images = clusters_of([finding.images for finding in findings])
        means = Resampled.means(np.array([_columns(finding) for finding in findings]), images, seed)
        ratios = [means.interval(lambda m, i=i: _vt_over_vv(m, [i])) for i in range(len(layers))]
        leaders = {layer: _leader(own) for layer, own in zip(layers, ratios, strict=True) if layer < n_layers - 1}
        shallow, deep = halves(len(layers))
        deep = [i for i in deep if layers[i] in leaders]
        hypotheses: dict[str, list[Claim]] = {"H1": [], "H2": []}
        if deep:
            first, last = (span([layers[i] for i in part]) for part in (shallow, deep))
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
            judged = [Claim(text, means.interval(statistic)) for text, statistic in claims.items()]
            hypotheses = {"H1": judged[:2], "H2": judged[2:]}
        return {
            "measures": {
                name: [numbers(means.interval(lambda m, n=n, i=i: m[..., n, i])) for i in range(len(layers))]
                for n, name in enumerate(MEASURES)
            },
            "log_vt_vv": [numbers(own) for own in ratios],
            "leaders": {str(layer): leader for layer, leader in leaders.items()},
            "takes_over": takes_over(leaders),
            "image_to_instruction": {
                name: numbers(means.interval(lambda m, a=a, b=b: m[..., a, :].sum(-1) / m[..., b, :].sum(-1)))
                for name, a, b in (("per_token", _IMG, _INS), ("together", _ALL_IMG, _ALL_INS))
            },
            "hypotheses": record(hypotheses),
        }

    def verdict(self, summary: Mapping[str, Any]) -> str:
        """Which flow leads where, what images contribute, and whether the hypotheses hold."""
        opening, counts, *hypotheses = told(summary)
        layers, leaders = summary["settings"]["examined"], summary["leaders"]
        leads = [
            f"- {flow}: {span(own) if (own := [int(n) for n, leader in leaders.items() if leader == flow]) else 'none'}"
            for flow in ("visual-textual", "intra-visual", "neither")
        ]
        over = summary["takes_over"]
        shift = (
            f"Intra-visual flow takes over for good in layer {over}."
            if over is not None
            else "Nowhere does intra-visual flow take over for good from visual-textual flow."
        )
        share = summary["image_to_instruction"]
        rows = [
            [str(layer), *(shown(summary["measures"][name][i]) for name in MEASURES), shown(summary["log_vt_vv"][i])]
            for i, layer in enumerate(layers)
        ]
        return (
            "\n\n".join(
                [
                    opening,
                    counts,
                    "## Which flow leads\n\nWhere the interval of log(S_vt / S_vv) leaves 0; the last layer is left "
                    "out, as nothing reads its image tokens:\n\n" + "\n".join(leads) + f"\n\n{shift}",
                    "## What images contribute\n\n"
                    f"An image token's importance is {shown(share['per_token'], '.2%')} of an instruction token's "
                    f"(S_img / S_ins over these layers); that of all image tokens together is "
                    f"{shown(share['together'], '.1%')} of the instruction's.",
                    *hypotheses,
                    "## By layer\n\n" + Table(["layer", *MEASURES, "log(S_vt / S_vv)"], rows).markdown().rstrip(),
                ]
            )
            + "\n"
        )


def takes_over(leaders: Mapping[int, str]) -> int | None:
    """The layer in which intra-visual flow leads, after visual-textual flow did for the last time; None: nowhere."""
    before = max((layer for layer, leader in leaders.items() if leader == "visual-textual"), default=None)
    after = [layer for layer, leader in leaders.items() if leader == "intra-visual"]
    return None if before is None else min((layer for layer in after if layer > before), default=None)


def _columns(finding: Finding) -> np.ndarray:
    """One sample's measures, then the sums over image and instruction tokens: (measure, layer)."""
    values = np.array([finding.found[name] for name in MEASURES], float)  # None becomes nan
    sums = [values[_IMG] * finding.lengths["image"], values[_INS] * finding.lengths["instruction"]]
    return np.stack([*values, *sums])


def _vt_over_vv(means: np.ndarray, layers: Sequence[int]) -> np.ndarray:
    """log(S_vt / S_vv) of some layers together."""
    return log_ratio(means[..., _VT, layers].sum(-1), means[..., _VV, layers].sum(-1))


def _leader(vt_over_vv: Interval) -> str:
    if vt_over_vv.low > 0:
        return "visual-textual"
    return "intra-visual" if vt_over_vv.high < 0 else "neither"
