"""Whether the paper's hypotheses hold: claims about numbers, judged by their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vlmflow.core.statistics import LEVEL, Interval

Judgement = Literal["holds", "does not hold", "undecided"]
HYPOTHESES = {
    "H1": "in shallow layers image tokens inject most visual information into instruction tokens",
    "H2": "in deeper layers image tokens aggregate the residual visual information among themselves",
}
_TOO_OFTEN_UNDEFINED = 1 - LEVEL


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

    def to_dict(self) -> dict[str, Any]:
        """The claim in JSON's own types."""
        return {"claim": self.text, "judgement": self.judgement, **self.number.to_dict()}


def judgement_of(claims: Sequence[Claim]) -> Judgement:
    """A hypothesis holds if all its claims do, and does not if one does not."""
    judgements = {claim.judgement for claim in claims}
    if "does not hold" in judgements:
        return "does not hold"
    return "holds" if judgements == {"holds"} else "undecided"


def judged(hypotheses: Mapping[str, Sequence[Claim]]) -> dict[str, Any]:
    """Hypotheses with their claims and judgements, in JSON's own types."""
    return {
        name: {"judgement": judgement_of(claims), "claims": [claim.to_dict() for claim in claims]}
        for name, claims in hypotheses.items()
    }
