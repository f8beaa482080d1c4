"""The figure of the caption benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmflow.tasks.cider import TOKENIZER, cider_d, tokenize
from vlmflow.tasks.core import Metric, Outcome, by_group


def cider(outcomes: Sequence[Outcome]) -> Metric:
    """CIDEr-D, a hundredfold as papers print it, over these images alone; an empty caption scores 0.

    The groups' values are means of the same scores, not CIDEr of the group alone.
    """
    captions = [tokenize(outcome.parsed or "") for outcome in outcomes]
    references = [[tokenize(text) for text in outcome.sample.references] for outcome in outcomes]
    scores = np.array(cider_d(captions, references))
    return Metric.mean("CIDEr", scores, {"tokenizer": TOKENIZER, **by_group(outcomes, scores)})
