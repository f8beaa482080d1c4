"""The lessons: patches name what they show, questions are answered, each blind to the others; and two half-way.

Half-way through the decoder options judge themselves, since an answer can only fetch the letter of an option that knows
it is the right one; and patches number the objects so far, since an answer can only fetch a sum that somebody made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from recipes.pico.batches import IGNORE, Batch, Patches
from recipes.pico.blockwise import Blocks
from vlmflow.pico.scenes import COLOUR_NAMES, COUNTS, NAMES

EMPTY_WEIGHT = 0.1
HALF_WAY = 7  # decoder layers after which options know whether they are right; the others fetch the letter


@dataclass(frozen=True)
class TaughtWords:
    """Token ids of the words that patches are taught to name and count by, and options to judge themselves by."""

    names: Int[Tensor, " names"]
    colours: Int[Tensor, " colours"]
    rows: Int[Tensor, " 2"]  # top, bottom
    columns: Int[Tensor, " 2"]  # left, right
    centre: Int[Tensor, ""]  # "objects", in the patch that holds an object's centre: something to count
    verdicts: Int[Tensor, " 2"]  # yes, no
    numbers: Int[Tensor, " numbers"]  # from 0

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> TaughtWords:
        """Look the words up."""

        def ids(*words: str) -> Tensor:
            return torch.tensor([tokenizer.encode(f" {w}", add_special_tokens=False)[0] for w in words])

        names, colours, centre = ids(*NAMES), ids(*COLOUR_NAMES), ids("objects")[0]
        numbers = ids(*map(str, range(COUNTS[1] + 1)))
        return cls(names, colours, ids("top", "bottom"), ids("left", "right"), centre, ids("yes", "no"), numbers)


def naming_loss(
    features: Float[Tensor, "scenes patches width"],
    words: Float[Tensor, "vocabulary width"],
    ids: TaughtWords,
    patches: Patches,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Every occupied patch names its object, that one's colour and quarter, and its centre; empty ones name nothing."""
    shown = patches.name >= 0
    empty = patches.known & ~shown
    occupied = features[shown]
    quarters = patches.quarter[shown]
    names, colours = (F.linear(occupied, words[index]) for index in (ids.names, ids.colours))
    loss = F.cross_entropy(names, patches.name[shown]) + F.cross_entropy(colours, patches.colour[shown])
    rows, columns = (F.linear(occupied, words[index]) for index in (ids.rows, ids.columns))
    loss = loss + F.cross_entropy(rows, quarters // 2) + F.cross_entropy(columns, quarters % 2)
    centre = features @ words[ids.centre]
    loss = loss + F.binary_cross_entropy_with_logits(centre[shown], patches.centre[shown].float())
    nothing = F.linear(features[empty], words[torch.cat([ids.names, ids.colours, ids.centre[None]])])
    loss = loss + EMPTY_WEIGHT * 2 * F.softplus(nothing).mean()
    right = {
        "object": (names.argmax(-1) == patches.name[shown]).float().mean().item(),
        "color": (colours.argmax(-1) == patches.colour[shown]).float().mean().item(),
        "place": (2 * rows.argmax(-1) + columns.argmax(-1) == quarters).float().mean().item(),
        "centre": ((centre[shown] > 0) == (patches.centre[shown] > 0)).float().mean().item(),
    }
    return loss, right


@dataclass(frozen=True)
class Reading:
    """Scores of every answer token, as answer_labels orders them; half-way, at every word of an option and patch."""

    answers: Float[Tensor, "answers vocabulary"]
    options: Float[Tensor, "words vocabulary"]
    patches: Float[Tensor, "scenes patches vocabulary"]


def see(
    model: LlavaForConditionalGeneration, pixels: Float[Tensor, "scenes 3 canvas canvas"]
) -> Float[Tensor, "scenes patches width"]:
    """The image tokens as the decoder gets them."""
    seen = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
    return model.model.multi_modal_projector(seen)


def read(
    model: LlavaForConditionalGeneration,
    features: Float[Tensor, "scenes patches width"],
    batch: Batch,
    opening: Int[Tensor, " opening"],
) -> Reading:
    """Read the questions about pictures; opening is the prompt before the picture."""
    decoder, scenes = model.model.language_model, len(features)
    ids = torch.cat([group.ids.flatten(1) for group in batch.groups], 1)
    blocks = Blocks(len(opening) + features.shape[1], tuple((g.ids.shape[1], g.ids.shape[2]) for g in batch.groups))
    embedded = torch.cat([decoder.embed_tokens(opening).expand(scenes, -1, -1), features, decoder.embed_tokens(ids)], 1)
    through = decoder(
        inputs_embeds=embedded,
        attention_mask=torch.zeros(1, 1, 1, 1),  # transformers lets a 4-D mask pass; the blocks decide
        position_ids=blocks.positions().expand(scenes, -1),
        use_cache=False,
        output_hidden_states=True,
        blocks=blocks,
    )
    half_way = through.hidden_states[HALF_WAY]
    return Reading(
        model.lm_head(through.last_hidden_state[:, blocks.prefix :][answer_mask(batch)]),
        model.lm_head(decoder.norm(half_way[:, blocks.prefix :][option_verdicts(batch) != IGNORE])),
        model.lm_head(decoder.norm(half_way[:, len(opening) : blocks.prefix])),
    )


def option_verdicts(batch: Batch) -> Int[Tensor, "scenes tokens"]:
    """The verdicts of all groups, one after the other."""
    return torch.cat([group.verdicts.flatten(1) for group in batch.groups], 1)


def verdict_loss(
    scores: Float[Tensor, "words vocabulary"], yes_no: Int[Tensor, " 2"], batch: Batch
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Every word of an option says yes where the right one begins so, else no; and the share of these that say yes."""
    verdicts = option_verdicts(batch)
    verdicts = verdicts[verdicts != IGNORE]
    said = scores[:, yes_no]
    right = verdicts == 1
    return F.cross_entropy(said, 1 - verdicts), {"verdict": (said[right].argmax(-1) == 0).float().mean().item()}


def counting_loss(
    scores: Float[Tensor, "scenes patches vocabulary"], numbers: Int[Tensor, " numbers"], patches: Patches
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Every patch says how many objects have their centre in it or before it; the share of pictures summed up right."""
    known = patches.known.all(1)
    so_far, said = patches.centre[known].cumsum(1), scores[known][..., numbers]
    summed = (said[:, -1].argmax(-1) == so_far[:, -1]).float().mean().item()
    return F.cross_entropy(said.flatten(0, 1), so_far.flatten()), {"sum": summed}


def answer_labels(batch: Batch) -> Int[Tensor, "scenes tokens"]:
    """The labels of all groups, one after the other."""
    return torch.cat([group.labels.flatten(1) for group in batch.groups], 1)


def answer_shares(batch: Batch) -> Float[Tensor, " answers"]:
    """What each answer token counts, in the order of ``read``: all questions as much, though captions are long."""
    asked = [(group.labels != IGNORE).flatten(0, 1) for group in batch.groups]
    questions = sum(len(mask) for mask in asked)
    shares = [
        (mask / mask.sum(1, keepdim=True)).reshape(len(group.labels), -1)
        for mask, group in zip(asked, batch.groups, strict=True)
    ]
    return torch.cat(shares, 1)[answer_mask(batch)] / questions


def answer_mask(batch: Batch) -> Tensor:
    """Where a question token is followed by an answer token."""
    return answer_labels(batch) != IGNORE


def right_by_kind(scores: Float[Tensor, "answers vocabulary"], batch: Batch) -> dict[str, tuple[int, int]]:
    """(right, asked) per kind; right means every token of the answer, as greedy decoding would give it."""
    labels = answer_labels(batch)
    wrong = torch.zeros_like(labels, dtype=torch.bool)
    wrong[labels != IGNORE] = scores.argmax(-1) != labels[labels != IGNORE]
    tally: dict[str, tuple[int, int]] = {}
    start = 0
    for group in batch.groups:
        _, questions, tokens = group.ids.shape
        block = wrong[:, start : start + questions * tokens].unflatten(1, (questions, tokens)).any(-1)
        start += questions * tokens
        for kinds, row in zip(group.kinds, block.tolist(), strict=True):
            for kind, missed in zip(kinds, row, strict=True):
                right, asked = tally.get(kind, (0, 0))
                tally[kind] = (right + (not missed), asked + 1)
    return tally
