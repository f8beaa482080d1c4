"""What every study's verdict says in Markdown, whatever the experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmflow.core.statistics import Interval
from vlmflow.flow.hypotheses import HYPOTHESES

_ENOUGH = 20  # images, for percentile intervals that can be believed


def in_text(interval: Mapping[str, Any], form: str = ".3g") -> str:
    """A recorded interval in words."""
    return Interval.from_dict(interval).text(form)


def opening(summary: Mapping[str, Any]) -> list[str]:
    """The title, and the paragraph on the samples."""
    settings, counts = summary["settings"], summary["samples"]
    return [
        f"# {settings['experiment'].capitalize()} of {settings['model']} on {settings['task']}",
        f"{counts['asked']} samples: {counts['dropped']} dropped, as they were answered right about a blank picture as "
        f"well, {counts['failed']} failed, {counts['kept']} kept, about {counts['images']} images. Of those kept, the "
        f"right answer's first token was the likeliest for {in_text(summary['right'], '.1%')}. Intervals are 95 % "
        "bootstraps over images"
        + (f", and from fewer than {_ENOUGH} they are too narrow." if counts["images"] < _ENOUGH else "."),
    ]


def judgements(summary: Mapping[str, Any]) -> list[str]:
    """A section on each hypothesis: whether it holds, and by which claims."""
    sections = []
    for name, hypothesis in summary["hypotheses"].items():
        judgement = hypothesis["judgement"]
        verb = "is undecided" if judgement == "undecided" else judgement
        claims = [
            f"- {claim['claim']}: {in_text(claim)}, {claim['judgement']}"
            + (f" (not defined in {claim['undefined']:.0%} of resamples)" if claim["undefined"] else "")
            for claim in hypothesis["claims"]
        ]
        unjudged = "- not judged: with so few layers there is no shallow and no deep part"
        sections.append("\n".join([f"## {name} {verb}", "", f"That {HYPOTHESES[name]}.", "", *(claims or [unjudged])]))
    return sections


def figure_title(summary: Mapping[str, Any]) -> str:
    """What stands above a study's figures."""
    settings, counts = summary["settings"], summary["samples"]
    return f"{settings['model']} on {settings['task']}, {counts['kept']} samples"
