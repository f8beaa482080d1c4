"""What a study says of the paper's hypotheses: claims about numbers, judged by their intervals, told in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from vlmflow.core.statistics import LEVEL, Interval, too_few
from vlmflow.records.schema import Claim, Hypothesis, Judgement, StudySummary

HYPOTHESES = {
    "H1": "in shallow layers image tokens inject most visual information into instruction tokens",
    "H2": "in deeper layers image tokens aggregate the residual visual information among themselves",
}
_TOO_OFTEN_UNDEFINED = 1 - LEVEL


def claim(text: str, number: Interval) -> Claim:
    """That a number is above 0: it holds if its interval is, does not if that is below or at 0, and else is open."""
    judgement: Judgement = "undecided"
    if number.undefined <= _TOO_OFTEN_UNDEFINED:
        if number.low > 0:
            judgement = "holds"
        elif number.high <= 0:
            judgement = "does not hold"
    return Claim(text, judgement, **number.to_dict())


def judged(claims: Sequence[Claim]) -> Hypothesis:
    """A hypothesis holds if all its claims do, and does not if one does not."""
    judgements = {claim.judgement for claim in claims}
    if "does not hold" in judgements:
        return Hypothesis("does not hold", list(claims))
    return Hypothesis("holds" if judgements == {"holds"} else "undecided", list(claims))


def in_markdown(summary: StudySummary, sections: Sequence[str]) -> str:
    """A study's verdict: its title, a paragraph on the samples, and the experiment's sections."""
    settings, counts = summary.settings, summary.samples
    opening = (
        f"# {settings['experiment'].capitalize()} of {settings['model']} on {settings['task']}\n\n"
        f"{counts.asked} samples: {counts.dropped} dropped, as they were answered right about a blank picture as "
        f"well, {counts.failed} failed, {counts.kept} kept, about {counts.images} images. Of those kept, the "
        f"right answer's first token was the likeliest for {summary.right.text('.1%')}. Intervals are of 95 % over "
        "images, Wilson's for shares of right answers and else bootstraps"
        + (f"; {few}." if (few := too_few(counts.images)) else ".")
    )
    return "\n\n".join([opening, *sections]) + "\n"


def judgements(summary: StudySummary) -> list[str]:
    """A section on each hypothesis: whether it holds, and by which claims."""
    sections = []
    for name, hypothesis in summary.hypotheses.items():
        verb = "is undecided" if hypothesis.judgement == "undecided" else hypothesis.judgement
        claims = [
            f"- {claim.claim}: {claim.number.text()}, {claim.judgement}"
            + (f" (not defined in {claim.number.undefined:.0%} of resamples)" if claim.number.undefined else "")
            for claim in hypothesis.claims
        ] or ["- not judged: with so few layers there is no shallow and no deep part"]
        sections.append("\n".join([f"## {name} {verb}", "", f"That {HYPOTHESES[name]}.", "", *claims]))
    return sections


def figure_title(summary: StudySummary) -> str:
    """What stands above a study's figures."""
    return f"{summary.settings['model']} on {summary.settings['task']}, {summary.samples.kept} samples"


def title_with_intervals(summary: StudySummary) -> str:
    """The same above figures that show intervals."""
    few = too_few(summary.samples.images)
    return f"{figure_title(summary)}, 95 % intervals" + (few and f"\nover {few}")
