"""One forward pass over a prompt: its image tokens are ranked and dropped on the way down."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from vlmflow.core.attention import take_sequence
from vlmflow.core.layout import Layout
from vlmflow.core.select import highest, right_align
from vlmflow.engine.cache import Slots, hold, layer_of
from vlmflow.engine.narrow import Narrowing, Selection
from vlmflow.engine.probe import watch
from vlmflow.engine.prompt import Prompt
from vlmflow.engine.ranking import Look, Reading, read_ahead, shadow
from vlmflow.engine.target import Target
from vlmflow.pruners import Pruner, Stage
from vlmflow.pruners.view import Sources, View


@dataclass(frozen=True)
class Record:
    """What is left of a prefill once it has ended: no cache, no mask, no features."""

    ids: Int[Tensor, "batch length"] | None  # none where embeddings were given
    layout: Layout
    past: int  # logical positions that were in the cache before
    selections: tuple[Selection, ...]  # what entered each layer; the first is all of the prompt
    kv_lengths: tuple[int, ...]  # slots of each layer's cache afterwards


@dataclass(frozen=True)
class Drop:
    """A stage of the pruner, for a batch."""

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
        in_order, by_layer = kwargs.get("deepstack_visual_embeds"), kwargs.get("deepstack_features")
        if in_order is not None:  # Qwen3-VL
            features, where = dict(enumerate(in_order, start=1)), kwargs["visual_pos_masks"]
            rest = {"deepstack_visual_embeds": in_order[:first]}
        elif by_layer is not None:  # Granite 4 Vision
            features, where = by_layer, kwargs["vision_mask"][..., 0]
            rest = {"deepstack_features": {layer: added for layer, added in by_layer.items() if layer <= first}}
        else:
            return None, kwargs
        later = {layer_idx: added for layer_idx, added in features.items() if layer_idx > first}
        if not later:
            return None, kwargs
        row = (where.flatten().cumsum(0) - 1).view(where.shape)
        return cls(later, row), {**kwargs, **rest}

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
    target: Target
    prompt: Prompt
    drops: dict[int, Drop]  # by the layer before which they happen
    looks: dict[int, Look]  # by the same layer, where the attention that ranks is seen
    selections: list[Selection]  # by layer, what enters it if nothing more is dropped; the whole prompt first
    held: dict[int, Slots]  # by layer, what its cache will hold
    narrowing: Narrowing  # since the latest drop
    reading: Reading | None = None  # for the next drop
    deepstack: Deepstack | None = None
    cache: Cache | None = None

    @classmethod
    def open(cls, pruner: Pruner, target: Target, looks: dict[int, Look], prompt: Prompt) -> Prefill:
        """Take in a prompt.

        Raises:
            ValueError: a sample with an image and no text after it, where that text ranks, or a prompt of a form that
                would be ranked wrongly.
        """
        n_layers = len(target.layers)
        whole = prompt.selection(bool(pruner.checked_stages(n_layers, 0)))
        counts = whole.image_tokens if any(whole.image_tokens) else ()
        samples = [pruner.checked_stages(n_layers, count) for count in counts]
        stages = list(zip(*samples, strict=True))  # of each, a row for the samples
        _check_question(pruner, stages, whole)
        keeps, left = [], whole.image_tokens
        for row in stages:
            left = tuple(min(stage.keep, count) for stage, count in zip(row, left, strict=True))
            keeps.append(left)
        if stages:
            target.refuse_length(prompt.past + whole.index.shape[1])
        quotas = torch.tensor(keeps, dtype=torch.long).to(whole.index.device, non_blocking=True)
        drops = {row[0].layer: Drop(keep, quota) for row, keep, quota in zip(stages, keeps, quotas, strict=True)}
        selections, held = [whole] * n_layers, {}
        narrowing = Narrowing(0, prompt.past, selections, held, target, target.is_flash)
        return cls(pruner, target, prompt, drops, looks if drops else {}, selections, held, narrowing)

    @property
    def selection(self) -> Selection:
        """The positions that are left now."""
        return self.selections[-1]

    def enter_text(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The text decoder's keyword arguments, without what ``enter`` will do in its place."""
        if not self.drops:
            return kwargs
        self.deepstack, kwargs = Deepstack.take_over(min(self.drops), kwargs)
        if "logits_to_keep" in kwargs and any(self.target.sources[layer_idx] != layer_idx for layer_idx in self.drops):
            kwargs = {**kwargs, "logits_to_keep": 0}  # for which Gemma 4 would compute the last rows only
        return kwargs

    def enter(
        self, layer_idx: int, module: Any, hidden: Float[Tensor, "*streams batch length hidden"], kwargs: dict[str, Any]
    ) -> tuple[Float[Tensor, "*streams batch left hidden"], dict[str, Any]]:
        """What decoder layer ``module`` is to be called with, in place of these states and keyword arguments.

        Raises:
            RuntimeError: attention that should rank was not seen.
            ValueError: a cache, kernel or argument that cannot take a pruned prompt.
        """
        self.cache = kwargs.get("past_key_values")
        if self.deepstack is not None:
            hidden = self.deepstack.add(layer_idx, hidden, self.selection)
        if layer_idx in self.drops:
            look = self.looks.get(layer_idx)
            if look is not None and look.is_ahead:
                self._read_ahead(layer_idx, module, hidden, kwargs)
            hidden = self.drop(layer_idx, hidden)
        for look in self.looks.values():
            if look.layer == layer_idx and not look.is_ahead:
                self.reading = Reading.of(look.queries, self.selection, layer_of(self.cache, layer_idx))
                watch(module.self_attn, self.reading)
        return hidden, self.narrowing.tell(layer_idx, kwargs)

    def _read_ahead(self, layer_idx: int, module: Any, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        cache = shadow(self.cache, layer_idx) if self.cache is not None and self.prompt.past else None
        kwargs = self.narrowing.tell(layer_idx, {**kwargs, "past_key_values": cache})
        self.reading = read_ahead(self.looks[layer_idx].queries, self.selection, layer_idx, module, hidden, kwargs)

    def drop(
        self, layer_idx: int, hidden: Float[Tensor, "*streams batch length hidden"]
    ) -> Float[Tensor, "*streams batch left hidden"]:
        """Drop the image tokens that lose at the stage before ``layer_idx``, by what ``reading`` has seen."""
        now, drop = self.selection, self.drops[layer_idx]
        column = right_align(now.image, max(now.image_tokens))
        valid = torch.gather(now.image, 1, column)
        kept = torch.zeros_like(now.image)
        if any(drop.keep):
            with torch.no_grad():
                scores = self.pruner.score(self._view(layer_idx, hidden, column, valid)).to(valid.device)
            kept = kept.scatter(1, column, highest(scores, drop.quota, valid))
        left, order = now.keep((now.valid & ~now.image) | kept, drop.keep)
        self.selections[layer_idx:] = [left] * (len(self.selections) - layer_idx)
        self.narrowing = replace(self.narrowing, first=layer_idx, _made={})
        self.reading = None
        return take_sequence(hidden, order)

    def _view(self, layer_idx: int, hidden: Tensor, column: Tensor, valid: Tensor) -> View:
        rows, key, look = None, column, self.looks.get(layer_idx)
        if look is not None:
            rows = self.reading.seen if self.reading is not None else None
            if rows is None:
                raise RuntimeError(
                    f"{self.pruner}: layer {look.layer} did not call its kernel through transformers' attention "
                    "interface, so its attention cannot be read"
                )
            key = column + (rows.key.shape[2] - hidden.shape[-2])  # the keys of earlier turns come first
        whole, now = self.selections[0], self.selection
        number = whole.image.cumsum(1) - 1
        ordinal = torch.gather(number, 1, torch.gather(now.index, 1, column)).clamp(min=0)
        states = hidden.flatten(0, -4)[0] if hidden.dim() > 3 else hidden  # of several streams, the first
        return View(valid, ordinal, whole.image_tokens, self.drops[layer_idx].keep, Sources(states, column, key, rows))

    def positions(self, layer_idx: int) -> Int[Tensor, "batch position"]:
        """The positions that the keys of a layer that was told will stand for in this prefill."""
        source = self.target.sources[layer_idx]
        if source in self.held:
            return self.held[source].position
        batch, length = self.selections[source].index.shape
        return torch.arange(self.prompt.past + length, device=self.selection.index.device).expand(batch, -1)

    def leave(
        self, hidden: Float[Tensor, "*streams batch left hidden"]
    ) -> Float[Tensor, "*streams batch length hidden"]:
        """What the last layer gave, back at its prompt positions; dropped ones are zero."""
        now, whole = self.selection, self.selections[0]
        if now is whole or hidden.shape[-2] < now.index.shape[1]:  # the last rows only, as Gemma 4 does
            return hidden
        if self.deepstack is not None:
            hidden = self.deepstack.add(len(self.selections), hidden, now)
        length = whole.index.shape[1]
        index = torch.where(now.valid, now.index, length).to(hidden.device)[..., None].expand_as(hidden)
        full = hidden.new_zeros(*hidden.shape[:-2], length + 1, hidden.shape[-1]).scatter(-2, index, hidden)
        return full[..., :length, :]

    def close(self) -> Record:
        """Tell the cache's pruned layers which slots they hold.

        Raises:
            RuntimeError: a stage did not run.
        """
        for layer_idx in self.drops:
            if self.selections[layer_idx] is self.selections[layer_idx - 1]:
                raise RuntimeError(
                    f"vlmflow: {self.pruner} was to prune before layer {layer_idx}, but that layer was called without "
                    "its hooks; attach before the model is compiled anew or its layers are replaced"
                )
        if self.cache is not None:
            hold(self.cache, self.held)
        lengths = [self.prompt.past + selection.index.shape[1] for selection in self.selections]
        for layer_idx, source in enumerate(self.target.sources):
            if layer_idx in self.held:
                lengths[layer_idx] = self.held[layer_idx].length
            elif source != layer_idx or not self.target.attends[layer_idx]:
                lengths[layer_idx] = 0
        return Record(self.prompt.ids, self.prompt.layout, self.prompt.past, tuple(self.selections), tuple(lengths))


def _check_question(pruner: Pruner, stages: list[tuple[Stage, ...]], whole: Selection) -> None:
    reads_text = any(stage.queries in ("question", "last") for row in stages for stage in row)
    counts = zip(whole.image_tokens, whole.question_tokens, strict=True)
    for sample, (image, question) in enumerate(counts):
        if reads_text and image and not question:
            raise ValueError(
                f"{pruner}: ranks image tokens by the attention of the text after them, but sample {sample} has none. "
                "Put the question behind the last image, and do not split the prompt (prefill_chunk_size) between them"
            )
