"""The state of one prefill: which prompt positions are still in the sequence, and what a layer must be told of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from vlmflow.core.attention import QueryRows, causal_mask, select_mask, take_sequence
from vlmflow.core.layout import Layout
from vlmflow.core.select import highest, right_align
from vlmflow.engine.cache import UNUSED, CacheLayer, Slots, capacity, hold, layer_of, physical_length, slots_of
from vlmflow.engine.probe import KernelCall, Watcher
from vlmflow.pruners import Pruner, Stage
from vlmflow.pruners.view import Sources, View


@dataclass(frozen=True)
class Selection:
    """The prompt positions that the hidden states hold between two stages, right-aligned in a ragged batch.

    The counts live on the host, so that nothing after the prefill's first look at the prompt waits for the device.
    """

    index: Int[Tensor, "batch length"]  # position in the prompt
    valid: Bool[Tensor, "batch length"]
    image: Bool[Tensor, "batch length"]
    question: Bool[Tensor, "batch length"]
    tokens: tuple[int, ...]  # valid positions of each sample
    image_tokens: tuple[int, ...]
    question_tokens: tuple[int, ...]

    @property
    def all_valid(self) -> bool:
        """Whether no sample is filled up."""
        return all(count == self.index.shape[1] for count in self.tokens)

    def keep(
        self, keep: Bool[Tensor, "batch length"], image_tokens: tuple[int, ...]
    ) -> tuple[Selection, Int[Tensor, "batch kept"]]:
        """The same sequence without the positions whose flag is not set, and where in this one its positions are."""
        counts = zip(self.tokens, self.image_tokens, image_tokens, strict=True)
        tokens = tuple(count - old + new for count, old, new in counts)
        order = right_align(keep, max(tokens))
        valid = torch.gather(keep, 1, order)
        selection = Selection(
            index=torch.gather(self.index, 1, order),
            valid=valid,
            image=torch.gather(self.image, 1, order) & valid,
            question=torch.gather(self.question, 1, order) & valid,
            tokens=tokens,
            image_tokens=image_tokens,
            question_tokens=self.question_tokens,
        )
        return selection, order


@dataclass
class Prefill:
    """One forward pass over a prompt, from the text model's first layer to its last."""

    pruner: Pruner
    layout: Layout
    past: int  # logical positions already in the cache
    selection: Selection
    stages: dict[int, tuple[Stage, ...]]  # by layer, one stage a sample
    keep: dict[int, tuple[int, ...]]  # by layer, the image tokens that a sample has from there on
    quota: dict[int, Int[Tensor, " batch"]]  # the same, where the states are
    history: dict[int, Selection] = field(default_factory=dict)  # by the layer that first saw it
    deepstack: dict[int, Tensor] = field(default_factory=dict)  # visual features to add, by the layer they enter
    deepstack_row: Int[Tensor, "batch length"] | None = None  # the features' row for each prompt position
    rows: QueryRows | None = None  # of the scored layer, for the next stage
    rows_first_key: int = 0  # the key of the sequence's first token
    cache: Cache | None = None
    held: dict[int, Slots] = field(default_factory=dict)  # by layer, for the cache
    _memo: dict[tuple[str, int], tuple[Any, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, pruner: Pruner, n_layers: int, layout: Layout, prompt: Tensor, past: int) -> Prefill:
        """Take in a prompt: its counts are read from the device here, once for the whole prefill.

        ``prompt`` (batch, length) is False at tokens that follow the prompt proper: an assistant's drafts, a
        teacher-forced answer. They see the pruned image and have no say in it.
        """
        image = layout.image & prompt
        question = layout.question & prompt
        flags = torch.stack([~layout.padding, image, question])
        tokens, image_tokens, question_tokens = map(tuple, flags.sum(2).tolist())
        length = image.shape[1]
        index = torch.arange(length, device=image.device).expand_as(image)
        selection = Selection(index, ~layout.padding, image, question, tokens, image_tokens, question_tokens)
        stages: dict[int, tuple[Stage, ...]] = {}
        if any(image_tokens):
            samples = [pruner.checked_stages(n_layers, count) for count in image_tokens]
            stages = {row[0].layer: row for row in zip(*samples, strict=True)}
        keep, left = {}, image_tokens
        for layer_idx, row in stages.items():
            left = keep[layer_idx] = tuple(min(stage.keep, count) for stage, count in zip(row, left, strict=True))
        quotas = torch.tensor(list(keep.values()), dtype=torch.long).to(image.device, non_blocking=True)
        quota = dict(zip(keep, quotas, strict=True))
        prefill = cls(pruner, layout, past, selection, stages, keep, quota, history={0: selection})
        prefill._check_question()
        return prefill

    def _check_question(self) -> None:
        reads_text = any(stage.queries in ("question", "last") for row in self.stages.values() for stage in row)
        counts = zip(self.selection.image_tokens, self.selection.question_tokens, strict=True)
        for sample, (image, question) in enumerate(counts):
            if reads_text and image and not question:
                raise ValueError(
                    f"{self.pruner}: ranks image tokens by the attention of the text after them, but sample {sample} "
                    "has none. Put the question behind the last image, and do not split the prompt "
                    "(prefill_chunk_size) between them"
                )

    @property
    def is_pruned(self) -> bool:
        """Whether some stage has been applied."""
        return len(self.history) > 1

    def watcher(self, stage: Stage, layer: CacheLayer | None) -> Watcher:
        """What looks at the scored layer's q and k for ``stage``; ``layer`` is that layer's cache."""
        filled = None if capacity(layer) is None else physical_length(layer)

        def look(call: KernelCall) -> tuple[Tensor, Any]:
            now = self.selection
            by_image = stage.queries == "image"
            flags, counts = (now.image, now.image_tokens) if by_image else (now.question, now.question_tokens)
            rows = right_align(flags, max(counts))
            row_valid = torch.gather(flags, 1, rows)
            if stage.queries == "last":
                rows, row_valid = rows[:, -1:], row_valid[:, -1:]
            n_query, key = call.query.shape[2], call.key
            if filled is not None:  # a static cache hands over its empty slots as well
                key = key[:, :, : filled + n_query]
            self.rows_first_key = key.shape[2] - n_query
            with torch.no_grad():
                self.rows = QueryRows.take(call.query, key, call.mask, rows, row_valid, call.scaling, call.softcap)
            return call.run()

        return look

    def apply(self, layer_idx: int, hidden: Float[Tensor, "batch length hidden"]) -> Tensor:
        """Drop the image tokens that lose at the stage before ``layer_idx``."""
        now, row, keep = self.selection, self.stages[layer_idx], self.keep[layer_idx]
        if row[0].queries is not None and self.rows is None:
            raise RuntimeError(
                f"{self.pruner}: layer {row[0].scored_layer} did not call its kernel through transformers' attention "
                "interface, so its attention cannot be read"
            )
        column = right_align(now.image, max(now.image_tokens))
        valid = torch.gather(now.image, 1, column)
        kept_image = torch.zeros_like(now.image)
        if any(keep):
            with torch.no_grad():
                scores = self.pruner.score(self._view(hidden, column, valid, keep)).to(valid.device)
            kept_image = kept_image.scatter(1, column, highest(scores, self.quota[layer_idx], valid))
        self.selection, order = now.keep((now.valid & ~now.image) | kept_image, keep)
        self.history[layer_idx] = self.selection
        self.rows = None
        self._memo.clear()
        return take_sequence(hidden, order)

    def _view(self, hidden: Tensor, column: Tensor, valid: Tensor, keep: tuple[int, ...]) -> View:
        first = self.history[0]
        number = first.image.cumsum(1) - 1
        ordinal = torch.gather(number, 1, torch.gather(self.selection.index, 1, column)).clamp(min=0)
        key_column = column + self.rows_first_key if self.rows is not None else column
        return View(valid, ordinal, first.image_tokens, keep, Sources(hidden, column, key_column, self.rows))

    def add_deepstack(self, layer_idx: int, hidden: Tensor) -> Tensor:
        """Add the visual features that the model would have added, at full length, before ``layer_idx``."""
        if layer_idx not in self.deepstack:
            return hidden
        assert self.deepstack_row is not None
        features = self.deepstack[layer_idx].to(hidden.device, hidden.dtype)
        row = torch.gather(self.deepstack_row, 1, self.selection.index).clamp(min=0).to(hidden.device)
        image = self.selection.image[..., None].to(hidden.device)
        return torch.where(image, hidden + features[row], hidden)

    def shorten(self, tensor: Tensor) -> Tensor:
        """A per-position table (..., batch or 1, prompt length, channel), for the positions that are left."""
        return self._remember("table", tensor, lambda: take_sequence(tensor, self.selection.index))

    def shorten_ids(self, ids: Tensor) -> Tensor:
        """Per-position ids (..., batch or 1, prompt length), for the positions that are left."""
        return self._remember("ids", ids, lambda: take_sequence(ids[..., None], self.selection.index)[..., 0])

    def mask(self, mask: Tensor | None, layer: CacheLayer | None, is_flash: bool) -> Tensor | None:
        """The mask that the model built for the whole prompt, narrowed to the rows and keys of a pruned layer."""
        return self._remember("mask", mask, lambda: self._mask(mask, layer, is_flash))

    def _mask(self, mask: Tensor | None, layer: CacheLayer | None, is_flash: bool) -> Tensor | None:
        slots, n_query, n_slots = self.slots(layer), self.selection.index.shape[1], capacity(layer)
        if mask is None or mask.dim() == 2:
            if slots.all_valid:
                return None
            if mask is not None or is_flash:
                return slots.valid
            built = causal_mask(n_query, slots.valid)
            return built if n_slots is None else pad(built, (0, n_slots - slots.length))
        position, valid = slots.position, slots.valid
        if n_slots is not None:
            position, valid = slots.padded(n_slots)
        elif layer is not None and layer.is_sliding:
            stored = min(slots.length - n_query, layer.sliding_window - 1) + n_query
            position, valid = (
                position[:, -stored:] - (slots.logical_length - mask.shape[-1]),
                valid[:, -stored:],
            )
        return select_mask(mask, self.selection.index, position, valid)

    def slots(self, layer: CacheLayer | None) -> Slots:
        """What a layer's cache will hold after this pass."""
        before = slots_of(layer)
        return self._remember("slots", before, lambda: self._slots(before, layer))

    def _slots(self, before: Slots | None, layer: CacheLayer | None) -> Slots:
        now = self.selection
        position, valid, all_valid = (
            torch.where(now.valid, self.past + now.index, UNUSED),
            now.valid,
            now.all_valid,
        )
        if self.past and before is None:
            past = torch.arange(self.past, device=position.device).expand(position.shape[0], -1)
            position, valid = torch.cat([past, position], 1), pad(valid, (self.past, 0), value=True)
        elif before is not None:
            past, past_valid = before.followed_by(physical_length(layer) - before.length, 0)
            position, valid = torch.cat([past, position], 1), torch.cat([past_valid, valid], 1)
            all_valid = all_valid and before.all_valid
        return Slots(position, valid, all_valid, self.past + self.layout.image.shape[1])

    def _remember(self, kind: str, given: Any, make: Callable[[], Any]) -> Any:
        key = (kind, id(given))
        if key not in self._memo:
            self._memo[key] = (given, make())  # holding what was given keeps its id from being used again
        return self._memo[key][1]

    def restore_length(self, hidden: Float[Tensor, "batch length hidden"]) -> Tensor:
        """Put the states back to their prompt positions; dropped ones are zero."""
        now, (batch, length) = self.selection, self.layout.image.shape
        index = torch.where(now.valid, now.index, length).to(hidden.device)[..., None].expand_as(hidden)
        full = hidden.new_zeros(batch, length + 1, hidden.shape[-1]).scatter(1, index, hidden)
        return full[:, :length]

    def selection_at(self, layer_idx: int) -> Selection:
        """The positions that entered a layer."""
        return self.history[max(first for first in self.history if first <= layer_idx)]

    def kv_length(self, layer_idx: int) -> int:
        """Slots of a layer's cache after this pass."""
        slots = self.held.get(layer_idx)
        return slots.length if slots is not None else self.past + self.selection_at(layer_idx).index.shape[1]

    def close(self) -> None:
        """Tell the cache's pruned layers which slots they hold, and let go of all but the record."""
        for layer_idx, slots in self.held.items():
            layer = layer_of(self.cache, layer_idx)
            if layer is not None:
                hold(layer, slots)
        self.cache = self.rows = self.deepstack_row = None
        self.deepstack.clear()
        self._memo.clear()
