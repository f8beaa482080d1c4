"""One forward pass over a prompt: its image tokens are ranked and dropped on the way down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from vlmflow.core.attention import take_sequence
from vlmflow.core.layout import Layout
from vlmflow.core.select import highest, right_align
from vlmflow.engine.cache import CacheLayer, Slots, hold, layer_of
from vlmflow.engine.narrow import Narrowing, Selection
from vlmflow.engine.probe import watch
from vlmflow.engine.ranking import Reading, read_ahead
from vlmflow.pruners import Pruner, Queries, Stage
from vlmflow.pruners.view import Sources, View


@dataclass(frozen=True)
class Record:
    """What is left of a prefill once it has ended: no cache, no mask, no features."""

    layout: Layout
    past: int  # logical positions that were in the cache before
    prompt: Selection  # all of it
    selections: tuple[Selection, ...]  # what entered each layer
    kv_lengths: tuple[int, ...]  # slots of each layer's cache afterwards


@dataclass(frozen=True)
class Drop:
    """A stage of the pruner, for a batch."""

    stage: Stage  # the first sample's; where they look is the same for all
    keep: tuple[int, ...]  # image tokens that a sample has from there on
    quota: Int[Tensor, " batch"]  # the same, where the states are


@dataclass(frozen=True)
class Deepstack:
    """Visual features that the model adds to its image tokens between layers, from the first drop on."""

    features: dict[int, Float[Tensor, "image hidden"]]  # by the layer they enter
    row: Int[Tensor, "batch length"]  # the features' row for each prompt position

    @classmethod
    def take_over(cls, first: int, kwargs: dict[str, Any]) -> tuple[Deepstack | None, dict[str, Any]]:
        """Leave the model what it adds to the whole prompt, ahead of layer ``first``, and take the rest."""
        features = kwargs.get("deepstack_visual_embeds")
        if features is None or len(features) <= first:
            return None, kwargs
        where = kwargs["visual_pos_masks"]
        row = (where.flatten().cumsum(0) - 1).view(where.shape)
        later = {layer_idx + 1: features[layer_idx] for layer_idx in range(first, len(features))}
        return cls(later, row), {**kwargs, "deepstack_visual_embeds": features[:first]}

    def add(
        self, layer_idx: int, hidden: Float[Tensor, "batch left hidden"], selection: Selection
    ) -> Float[Tensor, "batch left hidden"]:
        """Add what the model would have added, at full length, before ``layer_idx``."""
        if layer_idx not in self.features:
            return hidden
        features = self.features[layer_idx].to(hidden.device, hidden.dtype)
        row = torch.gather(self.row, 1, selection.index).clamp(min=0).to(hidden.device)
        image = selection.image[..., None].to(hidden.device)
        return torch.where(image, hidden + features[row], hidden)


@dataclass
class Prefill:
    """Drops image tokens of one prompt: ``enter`` before each layer, ``leave`` after the last, ``close`` at the end."""

    pruner: Pruner
    layout: Layout
    past: int  # logical positions already in the cache
    is_flash: bool  # whether the kernel takes 2-D padding masks
    prompt: Selection
    drops: dict[int, Drop]  # by the layer before which they happen
    watched: dict[int, Queries]  # by the layer whose attention will rank, if it is read as the layer computes it
    selections: list[Selection]  # by layer, what enters it if nothing more is dropped
    narrowing: Narrowing | None = None  # since the latest drop
    reading: Reading | None = None  # for the next drop
    deepstack: Deepstack | None = None
    cache: Cache | None = None
    held: dict[int, Slots] = field(default_factory=dict)  # by layer, for the cache

    @classmethod
    def open(cls, pruner: Pruner, n_layers: int, layout: Layout, prompt: Tensor, past: int, is_flash: bool) -> Prefill:
        """Take in a prompt: its counts are read from the device here, once for the whole prefill.

        ``prompt`` (batch, length) is False at tokens that follow the prompt proper: an assistant's drafts, a
        teacher-forced answer. They see the pruned image and have no say in it.

        Raises:
            ValueError: a sample with an image and no text after it, where that text ranks.
        """
        image, question = layout.image & prompt, layout.question & prompt
        flags = torch.stack([~layout.padding, image, question])
        tokens, image_tokens, question_tokens = map(tuple, flags.sum(2).tolist())
        index = torch.arange(image.shape[1], device=image.device).expand_as(image)
        whole = Selection(index, ~layout.padding, image, question, tokens, image_tokens, question_tokens)
        samples = [pruner.checked_stages(n_layers, count) for count in image_tokens] if any(image_tokens) else []
        stages = list(zip(*samples, strict=True))  # of each, a row for the samples
        _check_question(pruner, stages, whole)
        keeps, left = [], image_tokens
        for row in stages:
            left = tuple(min(stage.keep, count) for stage, count in zip(row, left, strict=True))
            keeps.append(left)
        quotas = torch.tensor(keeps, dtype=torch.long).to(image.device, non_blocking=True)
        rows = zip(stages, keeps, quotas, strict=True)
        drops = {stage.layer: Drop(stage, keep, quota) for (stage, *_), keep, quota in rows}
        watched = {stage.scored_layer: stage.queries for stage, *_ in stages if stage.queries and not stage.peek}
        return cls(pruner, layout, past, is_flash, whole, drops, watched, [whole] * n_layers)

    @property
    def selection(self) -> Selection:
        """The positions that are left now."""
        return self.selections[-1]

    def take_deepstack(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The text decoder's keyword arguments, without the features that ``enter`` will add in its place."""
        if self.drops:
            self.deepstack, kwargs = Deepstack.take_over(min(self.drops), kwargs)
        return kwargs

    def enter(
        self, layer_idx: int, module: Any, hidden: Float[Tensor, "batch length hidden"], kwargs: dict[str, Any]
    ) -> tuple[Float[Tensor, "batch left hidden"], dict[str, Any]]:
        """What decoder layer ``module`` is to be called with, in place of these states and keyword arguments.

        Raises:
            RuntimeError: attention that should rank was not seen.
            ValueError: a cache or kernel that cannot take a pruned prompt.
        """
        self.cache = kwargs.get("past_key_values")
        if self.deepstack is not None:
            hidden = self.deepstack.add(layer_idx, hidden, self.selection)
        if layer_idx in self.drops:
            self._peek(layer_idx, module, hidden, kwargs)
            hidden = self.drop(layer_idx, hidden)
        if layer_idx in self.watched:
            self.reading = Reading.of(self.watched[layer_idx], self.selection, layer_of(self.cache, layer_idx))
            watch(module.self_attn, self.reading)
        if self.narrowing is not None:
            kwargs, slots = self.narrowing.tell(layer_idx, kwargs)
            if self.cache is not None:
                self.held[layer_idx] = slots
        return hidden, kwargs

    def _peek(self, layer_idx: int, module: Any, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        stage = self.drops[layer_idx].stage
        if not (stage.peek and stage.queries):
            return
        if self.narrowing is not None:
            kwargs, _ = self.narrowing.tell(layer_idx, kwargs)
        kwargs = {**kwargs, "past_key_values": self.cache if self.past else None}
        self.reading = read_ahead(stage.queries, self.selection, layer_idx, module, hidden, kwargs)

    def drop(self, layer_idx: int, hidden: Float[Tensor, "batch length hidden"]) -> Float[Tensor, "batch left hidden"]:
        """Drop the image tokens that lose at the stage before ``layer_idx``, by what ``reading`` has seen."""
        now, drop = self.selection, self.drops[layer_idx]
        column = right_align(now.image, max(now.image_tokens))
        valid = torch.gather(now.image, 1, column)
        kept = torch.zeros_like(now.image)
        if any(drop.keep):
            with torch.no_grad():
                scores = self.pruner.score(self._view(drop, hidden, column, valid)).to(valid.device)
            kept = kept.scatter(1, column, highest(scores, drop.quota, valid))
        left, order = now.keep((now.valid & ~now.image) | kept, drop.keep)
        self.selections[layer_idx:] = [left] * (len(self.selections) - layer_idx)
        self.narrowing = Narrowing(left, self.past, self.layout.image.shape[1], self.is_flash)
        self.reading = None
        return take_sequence(hidden, order)

    def _view(self, drop: Drop, hidden: Tensor, column: Tensor, valid: Tensor) -> View:
        rows, key = None, column
        if drop.stage.queries:
            rows = self.reading.seen if self.reading is not None else None
            if rows is None:
                raise RuntimeError(
                    f"{self.pruner}: layer {drop.stage.scored_layer} did not call its kernel through transformers' "
                    "attention interface, so its attention cannot be read"
                )
            key = column + (rows.key.shape[2] - hidden.shape[1])  # the keys of earlier turns come first
        number = self.prompt.image.cumsum(1) - 1
        ordinal = torch.gather(number, 1, torch.gather(self.selection.index, 1, column)).clamp(min=0)
        sources = Sources(hidden, column, key, rows)
        return View(valid, ordinal, self.prompt.image_tokens, drop.keep, sources)

    def positions(self, layer: CacheLayer | None) -> Int[Tensor, "batch position"]:
        """The positions that a layer's keys will stand for in this prefill; ``layer`` is its cache."""
        if self.narrowing is not None:
            return self.narrowing.slots(layer).position
        batch, length = self.layout.image.shape
        return torch.arange(self.past + length, device=self.layout.image.device).expand(batch, -1)

    def leave(self, hidden: Float[Tensor, "batch left hidden"]) -> Float[Tensor, "batch length hidden"]:
        """What the last layer gave, back at its prompt positions; dropped ones are zero."""
        if self.narrowing is None:
            return hidden
        if self.deepstack is not None:
            hidden = self.deepstack.add(len(self.selections), hidden, self.selection)
        now, (batch, length) = self.selection, self.layout.image.shape
        index = torch.where(now.valid, now.index, length).to(hidden.device)[..., None].expand_as(hidden)
        full = hidden.new_zeros(batch, length + 1, hidden.shape[-1]).scatter(1, index, hidden)
        return full[:, :length]

    def close(self) -> Record:
        """Tell the cache's pruned layers which slots they hold."""
        if self.cache is not None:
            hold(self.cache, self.held)
        lengths = [self.past + selection.index.shape[1] for selection in self.selections]
        for layer_idx, slots in self.held.items():
            lengths[layer_idx] = slots.length
        return Record(self.layout, self.past, self.prompt, tuple(self.selections), tuple(lengths))


def _check_question(pruner: Pruner, stages: list[tuple[Stage, ...]], prompt: Selection) -> None:
    reads_text = any(stage.queries in ("question", "last") for row in stages for stage in row)
    counts = zip(prompt.image_tokens, prompt.question_tokens, strict=True)
    for sample, (image, question) in enumerate(counts):
        if reads_text and image and not question:
            raise ValueError(
                f"{pruner}: ranks image tokens by the attention of the text after them, but sample {sample} has none. "
                "Put the question behind the last image, and do not split the prompt (prefill_chunk_size) between them"
            )
