"""The choice of VTW's layer, against a loop that measures every candidate on every sample."""

import pytest
import torch

import tiny
from vlmflow import VTW, prune
from vlmflow.flow import withdrawal as room
from vlmflow.flow.withdrawal import kl_divergence, withdrawal


def by_hand(small, samples):
    """Mean KL(withdrawn || original) by layer, as the published search has it."""
    means = {}
    for layer in range(1, 6):
        total = 0.0
        for sample in samples:
            with torch.no_grad():
                original = small.model(**sample).logits[0, -1].log_softmax(-1)
                with prune(small.model, VTW(layer)):
                    withdrawn = small.model(**sample).logits[0, -1].softmax(-1)
            total += float((withdrawn * (withdrawn.log() - original)).sum())
        means[layer] = total / len(samples)
    return means


@pytest.fixture
def calls(monkeypatch):
    seen, next_token = [], room.next_token
    monkeypatch.setattr(room, "next_token", lambda model, sample: seen.append(1) or next_token(model, sample))
    return seen


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3_window"])
def test_chooses_as_the_plain_loop(family, calls):
    small = tiny.build(family)
    samples = small.samples[:3]
    means = by_hand(small, samples)
    for eta in (means[5] * 1.01, sorted(means.values())[2] * 1.01, 1e-9):
        expected = next((layer for layer, mean in means.items() if mean <= eta), None)
        calls.clear()
        found = withdrawal(small.model, samples, eta)
        assert found.layer == expected
        assert len(calls) <= 3 + 3 * 5
        for layer, divergence in found.divergence.items():
            if layer in found.exact:
                assert divergence == pytest.approx(means[layer], rel=1e-3, abs=1e-6)
            else:
                assert eta < divergence <= means[layer] * 1.001
    whole = withdrawal(small.model, samples, means[5] * 1.01, exhaustive=True)
    assert whole.layer == next(layer for layer, mean in means.items() if mean <= means[5] * 1.01)
    assert whole.divergence == pytest.approx(means, rel=1e-3, abs=1e-6)
    assert whole.exact == set(means)
    calls.clear()
    withdrawal(small.model, samples, 1e-9)
    assert len(calls) == 3 + 5  # every candidate is given up on its first sample
    calls.clear()
    assert withdrawal(small.model, samples, 1e9).layer == 1
    assert len(calls) == 3 + 3  # the first candidate will do


def test_a_batch_is_its_samples():
    small = tiny.build("llava")
    samples = small.samples[:3]
    expected = withdrawal(small.model, samples, 1.0, layers=[4, 2], exhaustive=True)
    together = withdrawal(small.model, [small.collate(samples)], 1.0, layers=[2, 4], exhaustive=True)
    assert together.layer == expected.layer
    assert list(expected.divergence) == [2, 4]
    assert together.divergence == pytest.approx(expected.divergence, rel=1e-3)


def test_divergence_has_its_direction():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.9, 0.05, 0.05]])
    expected = 0.5 * torch.log(torch.tensor(0.5 / 0.9)) + 0.5 * torch.log(torch.tensor(0.5 / 0.05))
    torch.testing.assert_close(kl_divergence(p.log(), q.log())[0].float(), expected)
    assert kl_divergence(q.log(), q.log())[0] == 0
    assert kl_divergence(q.log(), p.log())[0] == torch.inf  # a token that the original rules out


def test_bad_input_is_refused():
    small = tiny.build("llava")
    with pytest.raises(ValueError, match="no samples to choose by"):
        withdrawal(small.model, [], 0.003)
    with pytest.raises(ValueError, match="eta must be a positive divergence in nats, got 0"):
        withdrawal(small.model, small.samples[:1], 0.0)
    with pytest.raises(ValueError, match="sample 1 has no image to withdraw"):
        withdrawal(small.model, [small.samples[0], small.sample([6])], 0.003)
    with pytest.raises(ValueError, match="prunes before layer 6"):
        withdrawal(small.model, small.samples[:1], 0.003, layers=[6])
