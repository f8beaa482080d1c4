"""Whether a hypothesis holds: claims about numbers, judged by their intervals, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vlmflow.core.statistics import LEVEL, Interval

Judgement = Literal["holds", "does not hold", "undecided"]
HYPOTHESES = {
    "H1": "in shallow layers image tokens inject most visual information into instruction tokens",
    "H2": "in deeper layers image tokens aggregate the residual visual information among themselves",
}
_TOO_OFTEN_UNDEFINED = 1 - LEVEL
_ENOUGH = 20  # images, for percentile intervals that can be believed


@dataclass(frozen=True)
class Claim:
    """That a number is above 0."""

    text: str
    number: Interval

    @property
    def judgement(self) -> Judgement:
        """By the interval: it holds above 0, does not below or at 0, and else is not decided."""
        if math.isnan(self.number.low) or self.number.undefined > _TOO_OFTEN_UNDEFINED:
            return "undecided"
        if self.number.low > 0:
            return "holds"
        return "does not hold" if self.number.high <= 0 else "undecided"


def judge(claims: Sequence[Claim]) -> Judgement:
    """A hypothesis holds if all its claims do, and does not if one does not."""
    judgements = {claim.judgement for claim in claims}
    if "does not hold" in judgements:
        return "does not hold"
    return "holds" if judgements == {"holds"} else "undecided"


def record(hypotheses: Mapping[str, Sequence[Claim]]) -> dict[str, Any]:
    """Judged hypotheses in JSON's own types."""
    return {
        name: {
            "judgement": judge(claims),
            "claims": [
                {"claim": claim.text, "judgement": claim.judgement, **numbers(claim.number)} for claim in claims
            ],
        }
        for name, claims in hypotheses.items()
    }


def numbers(interval: Interval) -> dict[str, float | str | None]:
    """An interval in JSON's own types: nan is null, infinities are texts that ``float`` reads."""
    return {name: _plain(value) for name, value in asdict(interval).items()}


def _plain(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return str(value) if math.isinf(value) else value


def number(value: Any) -> float:
    """What ``numbers`` wrote."""
    return math.nan if value is None else float(value)


def shown(interval: Mapping[str, Any], form: str = ".3g") -> str:
    """A recorded interval in words."""
    value, low, high = (number(interval[name]) for name in ("value", "low", "high"))
    if math.isnan(value):
        return "not defined"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def told(summary: Mapping[str, Any]) -> list[str]:
    """The paragraphs that every verdict begins with, and those on the hypotheses."""
    settings, counts = summary["settings"], summary["samples"]
    paragraphs = [
        f"# {settings['experiment'].capitalize()} of {settings['model']} on {settings['task']}",
        f"{counts['asked']} samples: {counts['dropped']} dropped, as they were answered right about a blank picture as "
        f"well, {counts['failed']} failed, {counts['kept']} kept, about {counts['images']} images. Of those kept, the "
        f"right answer's first token was the likeliest for {shown(summary['right'], '.1%')}. Intervals are 95 % "
        "bootstraps over images"
        + (f", and from fewer than {_ENOUGH} they are too narrow." if counts["images"] < _ENOUGH else "."),
    ]
    for name, hypothesis in summary["hypotheses"].items():
        lines = [f"## {name} {_verb(hypothesis['judgement'])}", "", f"That {HYPOTHESES[name]}.", ""]
        lines += [
            f"- {claim['claim']}: {shown(claim)}, {claim['judgement']}"
            + (f" (not defined in {claim['undefined']:.0%} of resamples)" if claim["undefined"] else "")
            for claim in hypothesis["claims"]
        ]
        if not hypothesis["claims"]:
            lines.append("- not judged: with so few layers there is no shallow and no deep part")
        paragraphs.append("\n".join(lines))
    return paragraphs


def _verb(judgement: Judgement) -> str:
    return "is undecided" if judgement == "undecided" else judgement


def halves(count: int) -> tuple[list[int], list[int]]:
    """The first and the last half of so many parts, by number; of an odd count the middle one is in neither."""
    half = count // 2
    return list(range(half)), list(range(count - half, count))


def span(layers: Sequence[int]) -> str:
    """Layers in words, such as ``layers 0-3, 5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(texts)}"


def named_layers(layers: Sequence[int], n_layers: int) -> tuple[int, ...]:
    """The layers that are meant: all if none is named.

    Raises:
        ValueError: one that the model has not.
    """
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise ValueError(f"layers names layer {layer}, but this model has layers 0 to {n_layers - 1}")
    return tuple(sorted(set(layers))) or tuple(range(n_layers))
