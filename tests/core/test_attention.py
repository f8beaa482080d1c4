"""The tensor maths, against plain loops."""

import pytest
import torch

from vlmflow.core import attention
from vlmflow.core.attention import QueryRows, Scoring, causal_mask, select_mask, take_sequence


@pytest.fixture
def heads():
    torch.manual_seed(0)
    return torch.randn(2, 4, 7, 8), torch.randn(2, 2, 9, 8)  # two samples, four heads over two, 7 queries, 9 keys


def plain(query, key, visible, scaling, softcap=None, bias=None, sinks=None):
    """Attention weights head by head."""
    weights = torch.zeros(*query.shape[:3], key.shape[2])
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            logits = query[b, h] @ key[b, h // 2].T * scaling
            if softcap:
                logits = torch.tanh(logits / softcap) * softcap
            if bias is not None:
                logits = logits + bias[b, h]
            logits = logits.masked_fill(~visible[b], -torch.inf)
            if sinks is not None:
                logits = torch.cat([logits, sinks[h].expand(len(logits), 1)], 1)
            weights[b, h] = torch.softmax(logits, -1)[:, : key.shape[2]]
    return weights


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("form", ["none", "padding", "boolean", "additive"])
def test_rows_equal_plain_attention(heads, form, softcap):
    query, key = heads
    padding = torch.ones(2, 9, dtype=torch.bool)
    if form != "none":
        padding[1, :2] = False
    visible = causal_mask(7, padding)
    mask = {"none": None, "padding": padding.long(), "boolean": visible}.get(form)
    if form == "additive":
        mask = torch.zeros(2, 1, 7, 9).masked_fill(~visible, torch.finfo(torch.float32).min)
    rows = torch.tensor([[1, 4, 6], [2, 2, 5]])
    valid = torch.tensor([[True, True, True], [False, True, True]])
    got = QueryRows.take(query, key, mask, rows, valid, Scoring(0.3, softcap)).weights()
    whole = plain(query, key, visible[:, 0], 0.3, softcap)
    for b in range(2):
        for i in range(3):
            expected = whole[b, :, rows[b, i]] * valid[b, i]
            torch.testing.assert_close(got[b, :, i], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_what_a_kernel_adds_to_its_logits_counts(heads, with_bias, with_sinks):
    """A bias by position, and sinks, which take attention from every key: large ones turn rankings around."""
    query, key = heads
    bias = 5 * torch.randn(2, 4, 7, 9) if with_bias else None
    sinks = torch.tensor([30.0, -3.0, 0.0, 8.0]) if with_sinks else None
    rows = torch.tensor([[1, 4, 6], [2, 0, 5]])
    scoring = Scoring(0.3, bias=bias, sinks=sinks)
    got = QueryRows.take(query, key, None, rows, torch.ones(2, 3, dtype=torch.bool), scoring)
    whole = plain(query, key, causal_mask(7, torch.ones(2, 9, dtype=torch.bool))[:, 0], 0.3, bias=bias, sinks=sinks)
    expected = torch.take_along_dim(whole, rows[:, None, :, None], dim=2)
    torch.testing.assert_close(got.weights(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(got.weights(1, 2), expected[:, :, 1:2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision_are_those_of_double(heads, dtype):
    """Keys and queries with biases as large as Qwen2's, whose products overflow float16."""
    query, key = (20 * tensor + 150 for tensor in heads)
    query, key = query.to(dtype), key.to(dtype)
    assert not torch.isfinite(query[:, :, :, :].half() @ key.half().repeat_interleave(2, 1).transpose(2, 3)).all()
    rows, valid = torch.arange(7).expand(2, 7), torch.ones(2, 7, dtype=torch.bool)
    got = QueryRows.take(query, key, None, rows, valid, Scoring(0.01)).weights()
    visible = causal_mask(7, torch.ones(2, 9, dtype=torch.bool))[:, 0]
    expected = plain(query.double(), key.double(), visible, 0.01)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


def test_received_sums_rows_in_pieces(heads, monkeypatch):
    query, key = heads
    rows = torch.arange(7).expand(2, 7)
    seen = QueryRows.take(query, key, None, rows, torch.ones(2, 7, dtype=torch.bool))
    expected = seen.weights().mean(1).sum(1)
    monkeypatch.setattr(attention, "_row_budget", lambda device: 2 * 4 * 9 * 2)  # two rows at a time
    torch.testing.assert_close(seen.received(), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16])
def test_a_row_that_sees_nothing_is_an_error_unless_it_only_fills_up(heads, dtype):
    query, key = heads
    mask = causal_mask(7, torch.ones(2, 9, dtype=torch.bool)).clone()
    mask[1, :, 4] = False
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    rows, valid = torch.tensor([[3, 4], [3, 4]]), torch.tensor([[True, True], [True, False]])
    assert (QueryRows.take(query, key, mask, rows, valid).weights()[1, :, 1] == 0).all()
    with pytest.raises(RuntimeError, match="sees no token"):
        QueryRows.take(query, key, mask, rows, torch.ones_like(valid)).refuse_blind()


def test_take_sequence_with_leading_axes():
    table = torch.randn(3, 1, 5, 2)  # three kinds of position, one table for all samples
    index = torch.tensor([[0, 4], [1, 2]])
    out = take_sequence(table, index)
    assert out.shape == (3, 2, 2, 2)
    assert torch.equal(out[:, 1], table[:, 0, [1, 2]])


@pytest.mark.parametrize("boolean", [True, False])
def test_select_mask(boolean):
    visible = torch.rand(1, 1, 4, 6, generator=torch.Generator().manual_seed(0)) > 0.4
    hidden = torch.finfo(torch.float32).min
    mask = visible if boolean else torch.zeros(visible.shape).masked_fill(~visible, hidden)
    rows, columns = torch.tensor([[0, 3], [1, 2]]), torch.tensor([[0, 5, 9], [-2, 1, 2]])
    valid = torch.tensor([[True, True, True], [True, True, False]])
    out = select_mask(mask, rows, columns, valid)
    out = out if boolean else out == 0
    for b in range(2):
        for i, row in enumerate(rows[b]):
            for j, column in enumerate(columns[b]):
                inside = bool(valid[b, j]) and 0 <= column < 6
                assert out[b, 0, i, j] == (inside and bool(visible[0, 0, row, column.clamp(0, 5)]))
