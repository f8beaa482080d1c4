"""What the caption benchmarks share: the prompt and the figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmflow.tasks.cider import TOKENIZER, cider_d, tokenize
from vlmflow.tasks.core import Figure, Outcome, Sample


def caption_prompt(sample: Sample) -> str:
    """The paper's (appendix E), which is lmms-eval's."""
    return "Provide a one-sentence caption for the provided image."


def cider(outcomes: Sequence[Outcome]) -> Figure:
    """CIDEr-D, a hundredfold as papers print it, over these images alone; an empty caption scores 0.

    The groups' values are means of the same scores, not CIDEr of the group alone.
    """
    captions = [tokenize(outcome.parsed or "") for outcome in outcomes]
    references = [[tokenize(text) for text in outcome.sample.references] for outcome in outcomes]
    scores = np.array(cider_d(captions, references))
    groups = np.array([outcome.sample.group for outcome in outcomes])
    names = sorted(set(groups.tolist()))
    details: dict[str, object] = {"tokenizer": TOKENIZER}
    if len(names) > 1:
        details["groups"] = {name: 100 * float(scores[groups == name].mean()) for name in names}
    return Figure("CIDEr", scores, np.ones(len(scores)), details)
