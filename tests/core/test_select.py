"""Which tokens stay: padded, packed and in plain Python the same."""

import math

import pytest
import torch

from vlmflow.core.select import highest, highest_packed, right_align

NAN, INF = math.nan, math.inf
SAMPLES = [  # scores, and how many stay
    ([0.1, 0.9, 0.5, 0.7], 2),
    ([3.0, 1.0, 3.0, 3.0, 2.0, 3.0], 3),  # ties, at the cut too
    ([0.0, -0.0, 0.0], 1),
    ([], 0),
    ([5.0], 0),
    ([-1.0, -2.0], 2),
    ([1.0, 2.0], 9),  # more than there are
    ([1.0, NAN, 2.0, NAN, INF], 3),
    ([-INF, 4.0, -INF, -INF], 3),  # the lowest score is not padding
]


def plain(scores, keep):
    """Rank by hand: NaN above every number, and of equals the earlier first."""
    ranked = sorted((0, 0.0, i) if math.isnan(score) else (1, -score, i) for i, score in enumerate(scores))
    return sorted(i for _, _, i in ranked[:keep])


def padded(samples, filler=0.0):
    """Where each sample's kept tokens are, counted in the sample, after ranking them as a left-padded batch."""
    width = max(len(scores) for scores, _ in samples)
    rows = torch.tensor([[filler] * (width - len(scores)) + scores for scores, _ in samples])
    lengths = torch.tensor([[len(scores)] for scores, _ in samples])
    valid = torch.arange(width) >= width - lengths
    stays = highest(rows, torch.tensor([keep for _, keep in samples]), valid)
    assert not (stays & ~valid).any()
    return [(row.nonzero().flatten() - width + len(s)).tolist() for row, (s, _) in zip(stays, samples, strict=True)]


def packed(samples):
    """The same, after ranking them one behind the other."""
    lengths = [len(scores) for scores, _ in samples]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    scores = torch.tensor([score for scores, _ in samples for score in scores])
    stays = highest_packed(scores, torch.tensor([keep for _, keep in samples]), offsets)
    return [part.nonzero().flatten().tolist() for part in stays.split(lengths)]


@pytest.mark.parametrize("filler", [0.0, NAN, INF])
def test_padded_is_packed_is_plain(filler):
    """Together and alone; what fills a padded batch up has no say."""
    expected = [plain(*sample) for sample in SAMPLES]
    assert packed(SAMPLES) == padded(SAMPLES, filler) == expected
    for sample, kept in zip(SAMPLES, expected, strict=True):
        assert packed([sample]) == padded([sample]) == [kept]


def test_what_the_rules_say():
    """The restatement itself, by example."""
    kept = [plain(*sample) for sample in SAMPLES]
    assert kept == [[1, 3], [0, 2, 3], [0], [], [], [0, 1], [0, 1], [1, 3, 4], [0, 1, 2]]


@pytest.mark.parametrize("seed", range(20))
def test_random_batches(seed):
    """Few different scores, so that most of them tie."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 40, (6,), generator=rng).tolist()
    samples = [
        ((torch.randint(-3, 4, (n,), generator=rng) / 2).tolist(), int(torch.randint(0, n + 2, (), generator=rng)))
        for n in lengths
    ]
    assert packed(samples) == padded(samples) == [plain(*sample) for sample in samples]


def test_long_rows_rank_alike():
    """torch sorts long rows by another algorithm than short ones."""
    scores = (torch.arange(5000) % 7).float()
    samples = [(scores.tolist(), 1800), (scores.flip(0).tolist(), 3)]
    assert packed(samples) == padded(samples) == [plain(*sample) for sample in samples]


def test_right_align():
    flags = torch.tensor([[True, False, True, True], [False, False, True, False]])
    index = right_align(flags, 3)
    assert index[0].tolist() == [0, 2, 3]
    assert index[1, -1].item() == 2
    assert not flags[1, index[1, :2]].any()
