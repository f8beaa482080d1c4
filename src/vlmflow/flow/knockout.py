"""Knock-out: block the flow from some tokens to others in chosen layers, and see what the model can no longer do."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlmflow.core.attention import QueryRows
from vlmflow.core.layout import SEGMENTS, Layout
from vlmflow.core.select import right_align
from vlmflow.engine import TappedCall
from vlmflow.engine.cache import UNUSED

Part = str | Sequence[Iterable[int] | Int[Tensor, " _"]]
Positions = tuple[tuple[int, ...], ...]
How = Literal["zero", "mask"]

_ROW_BUDGET = 1 << 24  # attention weights alive at once while rows are computed anew (64 MB in float32)
_underway: dict[int, list[Knockout]] = {}  # by the identity of a call's query tensor, while its kernel runs


@dataclass(frozen=True)
class Knockout:
    """Blocks attention from ``source`` (keys) to ``target`` (queries) in exactly the named ``layers``.

    It is a tap of ``attach``:

    >>> with attach(model, taps=[Knockout("image", "instruction", layers=range(5))]):
    ...     output = model.generate(**inputs, max_new_tokens=4)
    >>> processor.decode(output[0, -2:], skip_special_tokens=True)  # it says green where nothing is blocked
    ' none'

    ``source`` and ``target`` are a segment (``system``, ``image``, ``instruction``), ``all``, or positions: one
    sequence for each row of the batch, counted as ``Trace.kept`` counts them, from the left of the padded prompt.
    Generated tokens follow the image, so they belong to the instruction; by position, they follow the prompt, and a
    position that is never generated blocks nothing. Tokens that a pruner has dropped are blocked already.

    ``how``: with ``zero`` the attention weights A(i, j) are set to 0 after the softmax, and what the target sees
    loses their share; with ``mask`` the softmax never sees the blocked keys, so that the rest shares the whole. A
    query left with no key at all attends to nothing. ``keep_diagonal`` leaves a token's attention to itself alone.
    ``heads`` are query heads, None for all.

    Several knock-outs of one layer act together: first every ``mask``, then every ``zero``.

    The layer's own kernel runs as ever, on its own mask; only rows that lose something are computed anew, in plain
    attention with a float32 softmax, a few at a time. All others keep every bit.

    Source: section 3.2 (``Knockout("image", "instruction", ...)``), section 3.3 (``Knockout("image", "image", ...)``,
    whose "i, j in V" includes the diagonal); both say ``zero``.
    Departs: the released script masks before the softmax, and edits a mask that later layers share, so that it blocks
    layer l and all later ones: ``layers=range(l, n_layers), how="mask"``.

    Raises:
        ValueError: at construction, for an unknown segment or ``how``, no layers, no positions, bad heads; in
            ``attach``, for a layer that the model has not; when run, for a sample without a named segment, a head
            that the model has not, and positions that do not fit the batch.
    """

    source: Part
    target: Part
    layers: Collection[int]
    heads: Collection[int] | None = None
    how: How = "zero"
    keep_diagonal: bool = False

    def __post_init__(self):
        object.__setattr__(self, "source", _part("source", self.source))
        object.__setattr__(self, "target", _part("target", self.target))
        object.__setattr__(self, "layers", tuple(sorted({int(layer) for layer in self.layers})))
        if not self.layers:
            raise ValueError("Knockout: layers is empty; name at least one layer, as in layers=range(5)")
        if self.heads is not None:
            object.__setattr__(self, "heads", tuple(sorted({int(head) for head in self.heads})))
            if not self.heads or min(self.heads) < 0:
                raise ValueError(f"Knockout: heads must name query heads from 0, or be None for all, got {self.heads}")
        if self.how not in ("zero", "mask"):
            raise ValueError(f"Knockout: how must be 'zero' or 'mask', got {self.how!r}")

    def __call__(self, call: TappedCall) -> tuple[Tensor, Any]:
        """Run the kernel, and take the blocked flow out of its output."""
        key = id(call.kernel.query)
        if key in _underway:  # another one wraps this one, and will block for both
            _underway[key].append(self)
            return call.kernel.run()
        together = _underway[key] = [self]
        try:
            out, weights = call.kernel.run()
        finally:
            del _underway[key]
        return _without(call, together, out, weights)


def random_positions(
    layout: Layout, like: str = "instruction", among: Collection[str] = ("image", "instruction"), seed: int = 0
) -> Positions:
    """Draw as many positions as the segment ``like`` has, from the segments ``among``: a knock-out's random control.

    The draw belongs to a token's number among its own sample's candidates, so it depends on neither batch nor padding.
    By default it is that of the paper's control, of image or instruction tokens: what comes before the image cannot
    see it, and of the text that can there is no more than the instruction itself.

    Source: Figure 4, "random tokens"; the released script draws from all that follows the system prompt.
    Departs: drawn once from a seed, where the script draws anew at every token that it generates.

    Raises:
        ValueError: unknown segment, or a sample with fewer candidates than wanted.
    """
    wanted = layout.positions(like)
    candidates = [torch.cat(parts).sort().values for parts in zip(*map(layout.positions, among), strict=True)]
    drawn = []
    for sample, (like_those, pool) in enumerate(zip(wanted, candidates, strict=True)):
        if len(pool) < len(like_those):
            raise ValueError(
                f"random_positions: sample {sample} has {len(like_those)} {like} tokens, but only {len(pool)} among "
                f"{', '.join(among)} to draw from; name more segments"
            )
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        drawn.append(tuple(sorted(pool.cpu()[order[: len(like_those)]].tolist())))
    return tuple(drawn)


def _part(field: str, part: Part) -> str | Positions:
    """A segment's name, or positions as tuples."""
    if isinstance(part, str):
        if part not in (*SEGMENTS, "all"):
            raise ValueError(
                f"Knockout: {field} must be one of {', '.join(SEGMENTS)}, all, or positions for each sample, "
                f"got {part!r}"
            )
        return part
    try:
        positions = tuple(tuple(int(position) for position in sample) for sample in part)
    except TypeError:
        raise ValueError(
            f"Knockout: {field} by position wants one sequence for each sample, as in [[5, 6], [3]], got {part!r}"
        ) from None
    if not any(positions):
        raise ValueError(f"Knockout: {field} names no position in any sample, so that nothing would be blocked")
    if min(min(sample) for sample in positions if sample) < 0:
        raise ValueError(f"Knockout: {field} names a negative position; count from the left of the padded prompt")
    return positions


def _flags(
    field: str, part: Any, layout: Layout, position: Int[Tensor, "batch position"]
) -> Bool[Tensor, "batch position"]:
    """Which of the given positions belong to a part; unused slots to none."""
    batch, length = layout.padding.shape
    if isinstance(part, str):
        table = ~layout.padding if part == "all" else getattr(layout, part)
        if not (there := table.any(1)).all():
            sample = int((~there).nonzero()[0])
            raise ValueError(
                f"Knockout: {field} is {part!r}, but sample {sample} of the batch has no {part} token; leave such "
                "samples out, or name positions"
            )
        later = (position != UNUSED) & (part in ("instruction", "all"))
        inside = torch.gather(table.to(position.device), 1, position.clamp(0, length - 1))
        return torch.where(position < length, inside, later)
    if len(part) != batch:
        raise ValueError(
            f"Knockout: {field} names positions for {len(part)} samples, but the batch has {batch} rows (each beam "
            "counts as one)"
        )
    for sample, padding in enumerate(layout.padding):
        named = torch.tensor([there for there in part[sample] if there < length], dtype=torch.long)
        if padding.cpu()[named].any():
            raise ValueError(
                f"Knockout: {field} names a position of sample {sample} that is padding; count from the left of the "
                "padded prompt"
            )
    return torch.stack([torch.isin(row, row.new_tensor(named)) for row, named in zip(position, part, strict=True)])


def _heads(knockout: Knockout, call: TappedCall) -> Bool[Tensor, " heads"]:
    """The query heads in which a knock-out blocks; one flag for all of them if it names none."""
    n_heads = call.kernel.query.shape[1]
    if knockout.heads is None:
        return torch.ones(1, dtype=torch.bool)
    if max(knockout.heads) >= n_heads:
        raise ValueError(
            f"Knockout: heads names {max(knockout.heads)}, but layer {call.layer} has heads 0 to {n_heads - 1}"
        )
    return torch.isin(torch.arange(n_heads), torch.tensor(knockout.heads))


def _without(call: TappedCall, knockouts: list[Knockout], out: Tensor, weights: Any) -> tuple[Tensor, Any]:
    """A kernel's output (batch, query, heads, channel), and its weights if it gave any, less what is blocked."""
    kernel, device = call.kernel, out.device
    batch, n_heads, _, _ = kernel.query.shape
    n_key = int((call.key_position != UNUSED).any(0).nonzero().max()) + 1  # a static cache ends in empty slots
    query_position, key_position = call.query_position.to(device), call.key_position[:, :n_key].to(device)
    sources = [_flags("source", knockout.source, call.layout, key_position) for knockout in knockouts]
    targets = [_flags("target", knockout.target, call.layout, query_position) for knockout in knockouts]
    heads = [_heads(knockout, call).to(device)[:, None, None] for knockout in knockouts]
    aimed = torch.stack(targets).any(0)
    count = int(aimed.sum(1).max())
    if not count:
        return out, weights
    rows = right_align(aimed, count)
    row_valid = torch.gather(aimed, 1, rows)
    key, value, scoring = kernel.key[:, :, :n_key], kernel.value[:, :, :n_key], kernel.scoring
    new_out, new_weights = [], []
    step = max(1, _ROW_BUDGET // (batch * n_heads * n_key))
    for some in torch.arange(count, device=device).split(step):
        row, valid = rows[:, some], row_valid[:, some]
        queries = QueryRows.take(kernel.query, key, kernel.mask, row, valid, scoring)
        is_boolean = queries.mask.dtype == torch.bool
        visible = queries.mask if is_boolean else queries.mask > torch.finfo(queries.mask.dtype).min / 2
        blocked = {how: torch.zeros_like(visible) for how in ("mask", "zero")}
        for knockout, source, target, in_heads in zip(knockouts, sources, targets, heads, strict=True):
            pairs = torch.gather(target, 1, row)[:, :, None] & source[:, None]
            if knockout.keep_diagonal:
                pairs = pairs & (torch.gather(query_position, 1, row)[:, :, None] != key_position[:, None])
            blocked[knockout.how] = blocked[knockout.how] | pairs[:, None] & in_heads
        mask = queries.mask.masked_fill(~visible | blocked["mask"], False if is_boolean else -torch.inf)
        attention = replace(queries, mask=mask).weights().masked_fill(blocked["zero"], 0.0)
        touched = ((blocked["mask"] | blocked["zero"]) & visible).any(-1) & valid[:, None]  # (batch, heads or 1, row)
        touched = touched.transpose(1, 2)[..., None]
        there = row[:, :, None, None]
        grouped = attention.to(value.dtype).reshape(batch, value.shape[1], -1, n_key)
        mixed = (grouped @ value).reshape(batch, n_heads, len(some), -1).transpose(1, 2)
        new_out.append(torch.where(touched, mixed, torch.take_along_dim(out, there, dim=1)))
        if weights is not None:
            old = torch.take_along_dim(weights, there.transpose(1, 2), dim=2)
            old[..., :n_key] = torch.where(touched.transpose(1, 2), attention.to(old.dtype), old[..., :n_key])
            new_weights.append(old)
    out = out.scatter(1, rows[:, :, None, None].expand(-1, -1, *out.shape[2:]), torch.cat(new_out, 1))
    if weights is not None:
        index = rows[:, None, :, None].expand(-1, n_heads, -1, weights.shape[3])
        weights = weights.scatter(2, index, torch.cat(new_weights, 2))
    return out, weights
