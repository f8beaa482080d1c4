"""A model under a pruner, as lmms-eval's simple interface asks it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from vlmflow.core.images import as_rgb
from vlmflow.engine import prune
from vlmflow.evaluate.on_torchrun import own_accelerator
from vlmflow.models import Question, load
from vlmflow.pruners import make_pruner

MAX_NEW_TOKENS = 128  # where a task says nothing


class Vlmflow(lmms):
    """``--model vlmflow --model_args pretrained=...,pruner=himap,k1=2,r1=0.5``: further arguments are the pruner's.

    Answers are greedy. ``until`` is ignored, as lmms-eval's own LLaVA does: it adds one to tasks that have none, and
    answers may hold blank lines.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "pico",
        pruner: str = "himap",
        device: str | None = None,
        batch_size: int | str = 1,
        dtype: str = "auto",
        max_batch_size: int | None = None,
        **fields: object,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number from 1 on, got {batch_size!r}")
        self._batch_size = int(batch_size)
        self._vlm = load(pretrained, device or own_accelerator(), dtype)
        texts = {name: str(value) for name, value in fields.items()}
        self._pruner = make_pruner(pruner, texts, self._vlm.n_layers, self._vlm.attends)
        self._pruner.checked_stages(self._vlm.n_layers, 0)

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answer each request, in batches of those that follow one another with answers of one length."""
        answers: dict[int, GenerationResult] = {}
        groups: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(_new_tokens(request.args[1]), []).append(number)
        size = self._batch_size
        batches = [(longest, n[i : i + size]) for longest, n in groups.items() for i in range(0, len(n), size)]
        bar = tqdm(total=len(requests), desc="Answering", disable=self.rank != 0)
        with prune(self._vlm.model, self._pruner), bar:
            for longest, batch in batches:
                questions = [self._question(*requests[number].args) for number in batch]
                for number, answer in zip(batch, self._vlm.answer(questions, longest), strict=True):
                    answers[number] = GenerationResult(answer.text, TokenCounts(output_tokens=answer.tokens))
                bar.update(len(batch))
        return [answers[number] for number in range(len(requests))]

    def _question(
        self, text: str, _settings: dict[str, Any], to_images: Any, doc_id: int, task: str, split: str
    ) -> Question:
        images = to_images(self.task_dict[task][split][doc_id]) or []
        named = f"{task}, document {doc_id}"
        return Question(text, tuple(as_rgb(image, named) for image in images))

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: pruning is a matter of answering."""
        raise NotImplementedError("vlmflow answers; tasks that compare likelihoods need another model")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("vlmflow answers single questions; tasks of several rounds need another model")


def _new_tokens(settings: dict[str, Any]) -> int:
    """The longest answer that a task wants.

    Raises:
        ValueError: it wants anything but greedy answers.
    """
    if settings.get("do_sample") or settings.get("temperature") or settings.get("num_beams") not in (None, 1):
        raise ValueError(f"vlmflow answers greedily; the task asks for {settings}")
    return int(settings.get("max_new_tokens", MAX_NEW_TOKENS))
