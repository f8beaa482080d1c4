"""Ask questions under one pruner, and keep what a reader wants to know of the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlmflow.core.cost import Cost
from vlmflow.engine import prune
from vlmflow.models.vlm import VLM, Answer, Question
from vlmflow.pruners import Pruner
from vlmflow.records.schema import AnswerRecord, CostRecord, MethodRun, to_json


@dataclass(frozen=True)
class Run:
    """One answered question: what was said, which image tokens stayed at each stage, what the prefill cost."""

    pruner: Pruner
    answer: Answer
    positions: tuple[int, ...]  # of the image tokens in the prompt
    image_tokens: tuple[int, ...]  # that entered each layer
    stages: dict[int, tuple[int, ...]]  # layer -> numbers, among the prompt's image tokens, of those that stayed
    cost: Cost

    @property
    def steps(self) -> str:
        """The number of image tokens from stage to stage, such as ``576→288→72``."""
        counts = [self.image_tokens[0], *(len(kept) for kept in self.stages.values())]
        return "→".join(map(str, counts))

    def record(self) -> MethodRun:
        """The run as it is written."""
        return MethodRun(
            pruner=self.pruner.to_dict(),
            answer=AnswerRecord(self.answer.text, self.answer.tokens),
            image_tokens=list(self.image_tokens),
            stages={str(layer): list(kept) for layer, kept in self.stages.items()},
            cost=CostRecord.of(self.cost),
        )

    def to_dict(self) -> dict[str, Any]:
        """The run in JSON's types."""
        return to_json(self.record())


def ask(
    vlm: VLM,
    questions: Sequence[Question],
    pruner: Pruner,
    max_new_tokens: int,
    inputs: Mapping[str, Tensor] | None = None,
) -> list[Run]:
    """Answer questions in one batch, greedily, with ``pruner`` attached.

    ``inputs`` is what ``vlm.encode`` makes of the questions, where that is at hand: several methods, one encoding.

    >>> from vlmflow import HiMAP
    >>> from vlmflow.models import load, open_image
    >>> from vlmflow.pico import samples
    >>> question = Question("What color is the rook?", (open_image(samples()[0].image),))
    >>> (run,) = ask(load("pico"), [question], HiMAP(), max_new_tokens=4)
    >>> run.answer.text, run.steps
    ('green', '576→288→72')

    Raises:
        ValueError: a pruner or model that do not fit (see ``attach``).
    """
    encoded = vlm.encode(questions) if inputs is None else dict(inputs)
    with prune(vlm.model, pruner) as trace:
        answers = vlm.generate(encoded, max_new_tokens)
        number = trace.layout.image.cumsum(1) - 1
        layers = [stage.layer for stage in pruner.stages(trace.n_layers, 0)]
        positions = trace.layout.positions("image")
        return [
            Run(
                pruner=pruner,
                answer=answer,
                positions=tuple(positions[sample].tolist()),
                image_tokens=tuple(counts[sample] for counts in trace.image_tokens),
                stages={layer: tuple(number[sample, trace.kept[layer][sample]].tolist()) for layer in layers},
                cost=cost,
            )
            for sample, (answer, cost) in enumerate(zip(answers, trace.costs(), strict=True))
        ]
