"""Tensor maths of attention: rows on demand, masks, and gathers along a sequence. Nothing here knows a model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def _row_budget(device: torch.device) -> int:
    """Attention weights alive at once while scores are summed, in float32.

    On a processor 8 MB, which its cache holds: every pass over them costs a third of what it does in memory. Elsewhere
    256 MB, so that launches are few.
    """
    return 1 << 21 if device.type == "cpu" else 1 << 26


def take_sequence(
    states: Shaped[Tensor, "*lead length channel"], index: Int[Tensor, "batch count"]
) -> Shaped[Tensor, "*lead2 count channel"]:
    """Gather along the sequence of ``states`` (..., batch or 1, length, channel), a different set for each sample."""
    batch = index.shape[0]
    states = states.expand(*states.shape[:-3], batch, *states.shape[-2:])
    index = index.to(states.device).view(*[1] * (states.dim() - 3), batch, -1, 1)
    return torch.take_along_dim(states, index, dim=-2)


def select_mask(
    mask: Tensor,
    rows: Int[Tensor, "batch row"] | None,
    columns: Int[Tensor, "batch column"],
    columns_valid: Bool[Tensor, "batch column"],
) -> Tensor:
    """Gather rows and columns of a 4-D attention mask (batch or 1, heads or 1, query, key).

    ``rows`` None keeps all rows. Columns outside of the mask, or not valid, become masked. The mask may be boolean
    (True: visible) or additive.
    """
    mask = mask.expand(columns.shape[0], *mask.shape[1:])
    if rows is not None:
        mask = torch.take_along_dim(mask, rows.to(mask.device)[:, None, :, None], dim=2)
    columns, columns_valid = columns.to(mask.device), columns_valid.to(mask.device)
    visible = (columns_valid & (columns >= 0) & (columns < mask.shape[-1]))[:, None, None, :]
    mask = torch.take_along_dim(mask, columns.clamp(0, mask.shape[-1] - 1)[:, None, None, :], dim=3)
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, torch.finfo(mask.dtype).min)


def causal_mask(n_query: int, key_valid: Bool[Tensor, "batch key"]) -> Bool[Tensor, "batch 1 query key"]:
    """A boolean causal mask whose last query is aligned with the last key; keys that are not valid are masked."""
    n_key = key_valid.shape[1]
    query = torch.arange(n_key - n_query, n_key, device=key_valid.device)
    visible = torch.arange(n_key, device=key_valid.device) <= query[:, None]
    return (visible & key_valid[:, None, :])[:, None]


@dataclass(frozen=True)
class Scoring:
    """How a kernel turns products of queries and keys into attention, the mask apart.

    ``scaling`` None is 1 / sqrt(channel). ``bias`` (batch or 1, heads or 1, query, key) is added to the logits;
    ``sinks`` are logits of their own, which take attention away from all keys of a head.
    """

    scaling: float | None = None
    softcap: float | None = None
    bias: Float[Tensor, "_ _ query key"] | None = None
    sinks: Float[Tensor, " heads"] | None = None


@dataclass(frozen=True)
class QueryRows:
    """Some queries of one attention layer with the keys they see: attention rows on demand, never the whole map.

    ``query`` and ``key`` are post-rotary. ``mask`` is boolean or additive; ``row_valid`` is False for rows that only
    pad a ragged batch: they attend to nothing.
    """

    query: Float[Tensor, "batch heads row channel"]
    key: Float[Tensor, "batch kv_heads key channel"]
    mask: Tensor
    row_valid: Bool[Tensor, "batch row"]
    scoring: Scoring  # its bias for these rows and keys

    @classmethod
    def take(
        cls,
        query: Float[Tensor, "batch heads query channel"],
        key: Float[Tensor, "batch kv_heads key channel"],
        mask: Tensor | None,
        rows: Int[Tensor, "batch row"],
        row_valid: Bool[Tensor, "batch row"],
        scoring: Scoring = Scoring(),
    ) -> QueryRows:
        """Pick ``rows`` of a layer's queries.

        ``mask`` is what the layer's kernel got: 4-D (boolean or additive), 2-D padding, or None for plain causal
        attention; in the last two cases the last query is aligned with the last key.
        """
        n_query, n_key = query.shape[2], key.shape[2]
        rows, row_valid = rows.to(query.device), row_valid.to(query.device)
        if mask is not None and mask.dim() == 4:
            mask = _rows_of(mask, rows)[..., :n_key]
        else:
            visible = torch.arange(n_key, device=query.device) <= (rows + (n_key - n_query))[..., None]
            if mask is not None:
                visible = visible & mask[:, None, :n_key].bool()
            mask = visible[:, None]
        if scoring.bias is not None:
            scoring = replace(scoring, bias=_rows_of(scoring.bias, rows)[..., :n_key])
        query = torch.take_along_dim(query, rows[:, None, :, None], dim=2)
        return cls(query, key, mask, row_valid, scoring)

    def weights(self, first: int = 0, last: int | None = None) -> Float[Tensor, "batch heads row key"]:
        """Attention weights of rows ``first`` to ``last``, in float32 from the products on.

        Half precision would not hold the products: those of float16 overflow where keys have large biases.
        """
        query, mask, row_valid = (
            self.query[:, :, first:last].float(),
            self.mask[:, :, first:last],
            self.row_valid[:, first:last],
        )
        batch, heads, n_row, channel = query.shape
        kv_heads, n_key = self.key.shape[1], self.key.shape[2]
        grouped = query.reshape(batch, kv_heads, heads // kv_heads * n_row, channel)
        logits = (grouped @ self.key.float().transpose(2, 3)).reshape(batch, heads, n_row, n_key)
        logits = logits * (self.scoring.scaling or channel**-0.5)
        if self.scoring.softcap is not None:
            logits = torch.tanh(logits / self.scoring.softcap) * self.scoring.softcap
        if self.scoring.bias is not None:
            logits = logits + self.scoring.bias[:, :, first:last].float()
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
        if self.scoring.sinks is not None:
            sinks = self.scoring.sinks.float().view(1, heads, 1, 1).expand(batch, heads, n_row, 1)
            logits = torch.cat([logits, sinks], dim=-1)
        weights = torch.softmax(logits, dim=-1)[..., :n_key]
        return weights.nan_to_num(0.0) * row_valid[:, None, :, None]

    def refuse_blind(self) -> None:
        """Refuse rows that see no key, of which nothing can be ranked.

        Raises:
            RuntimeError: there is a valid one; on an accelerator when it gets there, so that nothing waits for it.
        """
        mask = self.mask
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        sees = seen.any((1, 3)) | ~self.row_valid
        torch.ops.aten._assert_async.msg(sees.all(), "vlmflow: a token whose attention ranks sees no token at all")

    def received(self) -> Float[Tensor, "batch key"]:
        """Attention that each key receives: mean over heads, sum over the rows (Eq. 8 and 9)."""
        batch, heads, n_row, _ = self.query.shape
        n_key = self.key.shape[2]
        step = max(1, _row_budget(self.query.device) // max(1, batch * heads * n_key))
        total = self.weights(0, step).mean(1).sum(1)
        for first in range(step, n_row, step):
            total += self.weights(first, first + step).mean(1).sum(1)
        return total


def _rows_of(matrix: Tensor, rows: Int[Tensor, "batch row"]) -> Tensor:
    """Rows of a (batch or 1, heads or 1, query, key) tensor, other ones for each sample."""
    matrix = matrix.expand(rows.shape[0], -1, -1, -1)
    return torch.take_along_dim(matrix, rows[:, None, :, None], dim=2)
