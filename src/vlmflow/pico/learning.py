"""The two lessons: patches name what they show, and questions are answered, each blind to the others."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from vlmflow.pico.batches import IGNORE, Batch, Patches
from vlmflow.pico.blockwise import Blocks
from vlmflow.pico.scenes import COLOUR_NAMES, NAMES

EMPTY_WEIGHT = 0.1


@dataclass(frozen=True)
class PatchWords:
    """Token ids of the words that patches are taught to name."""

    names: Int[Tensor, " names"]
    colours: Int[Tensor, " colours"]
    rows: Int[Tensor, " 2"]  # top, bottom
    columns: Int[Tensor, " 2"]  # left, right
    centre: Int[Tensor, ""]  # "objects", in the patch that holds an object's centre: something to count

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> "PatchWords":
        """Look the words up."""

        def ids(*words: str) -> Tensor:
            return torch.tensor([tokenizer.encode(f" {w}", add_special_tokens=False)[0] for w in words])

        return cls(ids(*NAMES), ids(*COLOUR_NAMES), ids("top", "bottom"), ids("left", "right"), ids("objects")[0])


def naming_loss(
    features: Float[Tensor, "scenes patches width"],
    words: Float[Tensor, "vocabulary width"],
    ids: PatchWords,
    patches: Patches,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Every occupied patch names its object, colour, half and whether it is a centre; empty patches name nothing."""
    shown = patches.name >= 0
    empty = patches.known & ~shown
    occupied = features[shown]
    side = round(features.shape[1] ** 0.5)
    place = torch.arange(side * side).expand_as(patches.name)[shown]
    names, colours = (F.linear(occupied, words[index]) for index in (ids.names, ids.colours))
    loss = F.cross_entropy(names, patches.name[shown]) + F.cross_entropy(colours, patches.colour[shown])
    for index, half in ((ids.rows, place // side * 2 // side), (ids.columns, place % side * 2 // side)):
        loss = loss + F.cross_entropy(F.linear(occupied, words[index]), half)
    centre = features @ words[ids.centre]
    loss = loss + F.binary_cross_entropy_with_logits(centre[shown], patches.centre[shown].float())
    nothing = F.linear(features[empty], words[torch.cat([ids.names, ids.colours, ids.centre[None]])])
    loss = loss + EMPTY_WEIGHT * 2 * F.softplus(nothing).mean()
    right = {
        "object": (names.argmax(-1) == patches.name[shown]).float().mean().item(),
        "color": (colours.argmax(-1) == patches.colour[shown]).float().mean().item(),
        "centre": ((centre[shown] > 0) == (patches.centre[shown] > 0)).float().mean().item(),
    }
    return loss, right


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
) -> Float[Tensor, "answers vocabulary"]:
    """Scores of every answer token, as answer_labels orders them; opening is the prompt before the picture."""
    decoder, scenes = model.model.language_model, len(features)
    ids = torch.cat([group.ids.flatten(1) for group in batch.groups], 1)
    blocks = Blocks(len(opening) + features.shape[1], tuple((g.ids.shape[1], g.ids.shape[2]) for g in batch.groups))
    embedded = torch.cat([decoder.embed_tokens(opening).expand(scenes, -1, -1), features, decoder.embed_tokens(ids)], 1)
    hidden = decoder(
        inputs_embeds=embedded,
        attention_mask=torch.zeros(1, 1, 1, 1),  # transformers lets a 4-D mask pass; the blocks decide
        position_ids=blocks.positions().expand(scenes, -1),
        use_cache=False,
        blocks=blocks,
    ).last_hidden_state
    return model.lm_head(hidden[:, blocks.prefix :][answer_mask(batch)])


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
