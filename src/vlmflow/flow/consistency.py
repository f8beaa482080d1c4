"""How much a disruption changes what a model predicts: consistency of labels and of scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor


def label_consistency(before: Sequence[object], after: Sequence[object]) -> np.ndarray:
    """1 for each sample whose prediction stays what it was, else 0; the measure is their mean.

    Source: section 3.2. Labels are whatever can be compared: token ids, letters, answers.
    Departs: the released script asks whether the right label occurs anywhere in the disrupted output.

    Raises:
        ValueError: not one label before for each one after.
    """
    return np.array([float(old == new) for old, new in zip(before, after, strict=True)])


def score_consistency(
    before: Float[Tensor, "batch vocab"], after: Float[Tensor, "batch vocab"], top: int = 5
) -> np.ndarray:
    """Jaccard similarity of the ``top`` likeliest next tokens before and after, one a sample; the measure is the mean.

    |T ∩ T'| / |T ∪ T'|: 1 where the same tokens lead, in any order, 0 where none is left.

    Source: section 3.2, top 5. Scores may be logits or probabilities.

    Raises:
        ValueError: a vocabulary smaller than ``top``.
    """
    if before.shape[-1] < top:
        raise ValueError(f"score_consistency: top must be at most the vocabulary's {before.shape[-1]}, got {top}")
    same = (before.topk(top).indices[:, :, None] == after.topk(top).indices[:, None, :].to(before.device)).sum((1, 2))
    return (same / (2 * top - same)).double().cpu().numpy()
