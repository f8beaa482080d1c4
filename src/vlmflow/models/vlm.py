"""A model with its processor: questions in its chat template, greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList

from vlmflow.core.errors import typed_line
from vlmflow.engine.target import RECURRENT

BY_TOKEN = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}  # inputs with a number a token


class ModelError(ValueError):
    """A model cannot be loaded or gives no answers; the message says what to do."""


@dataclass(frozen=True)
class Question:
    """A prompt's text, and any number of images that it is about."""

    text: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What it said, without special tokens, and how many tokens that took."""

    text: str
    tokens: int


@dataclass(frozen=True)
class VLM:
    """A model with its processor."""

    name: str
    model: Any  # a transformers model and its processor: what they take differs from family to family
    processor: Any

    @property
    def commit(self) -> str | None:
        """The hub's commit of the checkpoint, None where it came from a folder."""
        return getattr(self.model.config, "_commit_hash", None)

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return self.model.config.get_text_config(decoder=True).num_hidden_layers

    @property
    def attends(self) -> tuple[bool, ...]:
        """Of each decoder layer, whether it attends; the others are recurrent."""
        return attending_layers(self.model.config)

    @property
    def device(self) -> torch.device:
        """Where inputs go: to the first weight that is not offloaded, or to the CPU, from where hooks fetch them."""
        weights = (weight.device for weight in self.model.parameters() if not weight.is_meta)
        return next(weights, torch.device("cpu"))

    def encode(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        """A left-padded batch of prompts, images before text, on the model's device.

        Raises:
            ModelError: a prompt of more tokens than the model has positions, behind which it answers nonsense, or one
                on which the processor fails.
        """
        try:
            batch = self._batch(questions)
        except (ValueError, TypeError, OSError):
            raise
        except Exception as error:  # whatever nonsense in its settings makes it run into
            raise ModelError(f"its processor fails ({typed_line(error)}); get the checkpoint again") from error
        longest = int(batch["attention_mask"].sum(1).max())
        positions = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if positions is not None and longest > positions:
            raise ModelError(
                f"the prompt has {longest} tokens, and the model positions for {positions}; ask less, or about fewer "
                "or smaller images"
            )
        dtype = self.model.dtype
        return {key: t.to(self.device, dtype if t.is_floating_point() else t.dtype) for key, t in batch.items()}

    def _batch(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        seeing = [question for question in questions if question.images]
        blind = [question for question in questions if not question.images]
        if not blind:
            return self._encode_images(seeing)
        if not seeing:
            return self._encode_text(blind)
        # apart, since some processors refuse a prompt without images, or misplace its start, in such a batch
        has_images = torch.tensor([bool(question.images) for question in questions])
        padding = self.processor.tokenizer.pad_token_id
        return _interleave(self._encode_images(seeing), self._encode_text(blind), has_images, padding)

    def _encode_images(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        prompts = [self._prompt(question) for question in questions]
        images = [list(question.images) for question in questions]
        batch = self.processor(text=prompts, images=images, **self._text_options(prompts))
        return {key: value for key, value in batch.items() if key != "labels"}  # PaliGemma's, of no use for an answer

    def _encode_text(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        prompts = [self._prompt(question) for question in questions]
        types = "token_type_ids" in self.processor.model_input_names
        return dict(self.processor.tokenizer(prompts, return_token_type_ids=types, **self._text_options(prompts)))

    def _text_options(self, prompts: Sequence[str]) -> dict[str, Any]:
        start = self.processor.tokenizer.bos_token
        started = start is not None and prompts[0].startswith(start)  # by the chat template; a second start would harm
        return {"padding": True, "padding_side": "left", "return_tensors": "pt", "add_special_tokens": not started}

    def _prompt(self, question: Question) -> str:
        processor = self.processor
        if not processor.chat_template:  # a model that was never taught to chat, such as PaliGemma
            if question.images:
                return processor.image_token * len(question.images) + question.text
            return f"{processor.tokenizer.bos_token or ''}{question.text}\n"  # as its processor ends those with images
        content = [{"type": "image"} for _ in question.images] + [{"type": "text", "text": question.text}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> list[Answer]:
        """Greedy answers to questions, asked in one batch (see ``generate``)."""
        return self.generate(self.encode(questions), max_new_tokens)

    def generate(self, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> list[Answer]:
        """Greedy answers to encoded questions.

        Raises:
            ModelError: a token's logits are not finite.
        """
        processor, model = self.processor, self.model
        checks = LogitsProcessorList([FiniteLogits()])
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, logits_processor=checks)
        new = out[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(new, skip_special_tokens=True)
        ends = torch.tensor(self._end_ids, device=new.device)
        lengths = (~torch.isin(new, ends)).cumprod(1).sum(1).tolist()
        return [Answer(text.strip(), length) for text, length in zip(texts, lengths, strict=True)]

    @property
    def _end_ids(self) -> list[int]:
        ends, padding = self.model.generation_config.eos_token_id, self.model.generation_config.pad_token_id
        return [token for token in [*(ends if isinstance(ends, list) else [ends]), padding] if token is not None]


def attending_layers(config: Any) -> tuple[bool, ...]:
    """Of each decoder layer that a model's config names, whether it attends; the others are recurrent."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or [""] * text.num_hidden_layers
    return tuple(kind not in RECURRENT for kind in kinds)


class FiniteLogits(LogitsProcessor):
    """Refuses logits from which no token can be read: the largest of them nan or infinite."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores as they are."""
        if not torch.isfinite(scores.amax(-1)).all():
            raise ModelError("the model's logits are not finite (nan or inf); take another dtype, such as float32")
        return scores


def _interleave(
    first: dict[str, torch.Tensor],
    second: dict[str, torch.Tensor],
    of_first: Bool[torch.Tensor, " batch"],
    padding: int,
) -> dict[str, torch.Tensor]:
    """One left-padded batch of two, the second without images; ``of_first`` says which samples are the first's."""
    widths = [part["input_ids"].shape[1] for part in (first, second)]
    batch = dict(first)
    for key in BY_TOKEN & first.keys():
        whole = torch.full((len(of_first), max(widths)), padding if key == "input_ids" else 0)
        whole[of_first, -widths[0] :] = first[key]
        if key in second:
            whole[~of_first, -widths[1] :] = second[key]
        batch[key] = whole
    return batch
