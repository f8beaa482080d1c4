"""What a prompt consists of: which of its tokens are images, padding, question, and where it ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from vlmflow.core.layout import Layout
from vlmflow.engine.calls import Generation
from vlmflow.engine.narrow import Selection
from vlmflow.engine.target import Target

_answer_start: ContextVar[int | Sequence[int] | Tensor | None] = ContextVar("answer_start", default=None)


@contextmanager
def answer_starts(position: int | Sequence[int] | Tensor) -> Iterator[None]:
    """Say where prompts end, for all calls of attached models inside this block.

    ``position`` counts a row's tokens from 0, padding included: one for all rows, or (batch,). Tokens from there on see
    the pruned image, and have no say in what is kept. Without it the end is guessed: at the first token after the last
    image that has a label, or else ``logits_to_keep - 1`` tokens before the end of the row; and where that would leave
    a row no question, at the end of the row.

    >>> with prune(model, HiMAP()), answer_starts(inputs["input_ids"].shape[1] - 2):
    ...     logits = model(**inputs).logits  # of two last tokens that are an answer
    """
    token = _answer_start.set(position)
    try:
        yield
    finally:
        _answer_start.reset(token)


@dataclass(frozen=True)
class Inputs:
    """What the model around the text decoder was called with: only it sees token ids."""

    ids: Int[Tensor, "batch length"] | None
    image: Bool[Tensor, "batch length"]
    kwargs: Mapping[str, Any]
    generation: Generation | None  # the generation that the call is part of

    @classmethod
    def read(
        cls,
        target: Target,
        ids: Int[Tensor, "batch length"] | None,
        embedded: Int[Tensor, "batch2 length2"] | None,
        kwargs: Mapping[str, Any],
    ) -> Inputs:
        """Find the images in a call of the model: by its token ids, or by the embeddings that it was given.

        ``embedded`` are the ids that the model embedded last.
        """
        if ids is None:
            image = _embedded_images(target, kwargs["inputs_embeds"], embedded)
        else:
            image = Layout.read(ids, target.image_token_ids).image
        return cls(ids, image, kwargs, Generation.running())

    def prompt(self, embeds: Tensor, mask: Any, past: int) -> Prompt:
        """The same as the text decoder reads it, on top of ``past`` positions; ``mask`` is the decoder's own."""
        batch, length = embeds.shape[:2]
        given = self.kwargs.get("attention_mask")
        padding, packed = _padding(mask if given is None else given, batch, length, past, embeds.device)
        layout = Layout(self.image.to(embeds.device) & ~padding, padding)
        place = self.kwargs.get("position_ids")
        if place is not None and place.dim() == 3 and place.shape[0] == 4:  # of Qwen: the text's, then the image's
            place = place[0]
        if place is not None and place.dim() == 2 and place.shape[1] == length:
            restarts = pad(place[:, 1:] < place[:, :-1], (1, 0)).to(padding.device)
            packed = restarts & ~padding & ~padding.roll(1, 1)
        if self.kwargs.get("cu_seq_lens_q") is not None:  # the lengths of packed texts
            packed = ~padding
        return Prompt(layout, packed, _after_prompt(layout, self.kwargs), self.ids, past, self.generation)


@dataclass(frozen=True)
class Prompt:
    """What the text decoder reads."""

    layout: Layout
    packed: Bool[Tensor, "batch length"] | None  # signs that a row holds several texts, where there may be some
    answer: Bool[Tensor, "batch length"] | None  # tokens that follow the prompt proper: a taught answer, drafts
    ids: Int[Tensor, "batch length"] | None
    past: int  # logical positions in the cache before
    generation: Generation | None

    def selection(self, will_drop: bool) -> Selection:
        """All of it, with counts: they are read from the device here, once for the whole prefill.

        Raises:
            ValueError: a form of prompt of which image tokens would be dropped wrongly, where some will be.
        """
        layout, place = self.layout, torch.arange(self.layout.image.shape[1], device=self.layout.image.device)
        image, valid = layout.image, ~layout.padding
        question = layout.question if self.answer is None else layout.question & ~self.answer
        flags = [valid, image, question]
        if self.packed is not None:
            flags.append(self.packed)
        if self.generation is not None:
            flags.append(layout.padding & (place == len(place) - 1))
        tokens, image_tokens, question_tokens, *odd = map(tuple, torch.stack(flags).sum(2).tolist())
        if will_drop and any(image_tokens):
            self._refuse(self.packed is not None and any(odd[0]), self.generation is not None and any(odd[-1]))
        return Selection(place.expand_as(image), valid, image, question, tokens, image_tokens, question_tokens)

    def _refuse(self, is_packed: bool, is_right_padded: bool) -> None:
        if is_packed:
            raise ValueError(
                "vlmflow: several texts are packed into one row, which cannot be pruned one by one; give each its own "
                "row (in TRL: packing=False, padding_free=False)"
            )
        generation, end = self.generation, self.past + self.layout.image.shape[1]
        if is_right_padded:
            raise ValueError(
                "vlmflow: generate() was given a batch padded on the right, from which a model goes on behind padding; "
                'set processor.tokenizer.padding_side = "left"'
            )
        if generation is not None and generation.chunk_size is not None and end < generation.length:
            raise ValueError(
                "vlmflow: prefill_chunk_size cuts the prompt behind an image, where all of the question must be read "
                "to rank its tokens; leave it out, or make the chunk reach the end of the prompt"
            )


def _embedded_images(target: Target, embeds: Tensor, embedded: Tensor | None) -> Bool[Tensor, "batch length"]:
    """Images that were embedded: as the ids that were embedded last say, if it was them, or by their placeholders."""
    table = target.embedding
    if embedded is not None and embedded.shape[1] == embeds.shape[1] and not embeds.shape[0] % embedded.shape[0]:
        ids = embedded.repeat_interleave(embeds.shape[0] // embedded.shape[0], 0)  # for beams and further answers
        image = Layout.read(ids, target.image_token_ids).image
        if bool((image | torch.isclose(embeds, table(ids).to(embeds)).all(-1)).all()):
            return image
    image = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    for token_id in target.image_token_ids:
        image |= (embeds == table(torch.full((), token_id, device=embeds.device))).all(-1)
    return image


def _after_prompt(layout: Layout, kwargs: Mapping[str, Any]) -> Bool[Tensor, "batch length"] | None:
    """Which tokens follow the prompt proper; see ``answer_starts`` for how that is known or guessed."""
    labels, kept, start = kwargs.get("labels"), kwargs.get("logits_to_keep", 0), _answer_start.get()
    if start is None and labels is None and isinstance(kept, int) and kept <= 1:
        return None
    question, (batch, length) = layout.question, layout.image.shape
    place = torch.arange(length, device=question.device)
    if start is not None:
        start = torch.as_tensor(start, device=question.device).reshape(-1, 1)
        if start.shape[0] not in (1, batch):
            raise ValueError(f"answer_starts: wanted one position, or {batch}, one a row; got {start.shape[0]}")
        return (place >= start).expand(batch, -1)
    if labels is not None:
        taught = question & (labels.to(question.device) != -100)
        follows = taught.cumsum(1) > 0
    else:
        first = kept.min().to(place.device) if isinstance(kept, Tensor) else length - kept
        follows = (place > first).expand(batch, -1)
    return follows & (question & ~follows).any(1, keepdim=True)


def _padding(
    mask: Any, batch: int, length: int, past: int, device: torch.device
) -> tuple[Bool[Tensor, "batch length"], Bool[Tensor, "batch length"] | None]:
    """Which of the new positions are padding, by a model's mask, and which are real but unseen by the last of them."""
    if isinstance(mask, dict):  # by layer type
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.zeros(batch, length, dtype=torch.bool, device=device), None
    if not isinstance(mask, Tensor):
        raise ValueError(f"vlmflow: cannot read an attention mask of type {type(mask).__name__}")
    if mask.dim() == 2:
        return ~mask[:, -length:].to(device).bool().expand(batch, length), None
    seen = mask[:, 0, -length:, past : past + length].to(device)
    seen = seen if seen.dtype == torch.bool else seen == 0
    padding = ~seen[:, -1].expand(batch, length)
    sees_itself_alone = seen.diagonal(dim1=1, dim2=2) & ~seen[..., -1]  # rows of padding see nothing, or everything
    return padding, padding & sees_itself_alone
