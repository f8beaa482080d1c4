"""What a disruption changes: consistency of labels and of scores."""

import pytest
import torch

from vlmflow.flow.consistency import label_consistency, score_consistency


def test_labels_are_compared():
    assert label_consistency(["A", "B", "C"], ["A", "C", "C"]).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="shorter"):
        label_consistency([1, 2], [1])


def test_a_label_is_compared_whole():
    """The released script would find "A" in "Bad Answer", and count it as kept."""
    assert label_consistency(["A"], ["Bad Answer"]).tolist() == [0]


def test_scores_are_compared_as_sets():
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 6, 12, generator=generator)
    after[0] = before[0] * 2 + 1  # the same order
    after[1] = -before[1]
    for top in (1, 5):
        expected = []
        for one, other in zip(before, after, strict=True):
            first, second = set(one.topk(top).indices.tolist()), set(other.topk(top).indices.tolist())
            expected.append(len(first & second) / len(first | second))
        assert score_consistency(before, after, top).tolist() == pytest.approx(expected)
    assert score_consistency(before, after)[0] == 1
    assert score_consistency(before, after)[1] == 0
    with pytest.raises(ValueError, match="top must be at most the vocabulary's 12, got 13"):
        score_consistency(before, after, top=13)
