"""Ask one question under one pruner, and keep what a reader wants to know of the answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vlmflow.cost import Cost
from vlmflow.engine import prune
from vlmflow.models import VLM, Answer, Question
from vlmflow.pruners import Pruner


@dataclass(frozen=True)
class Run:
    """One answered question: what was said, which image tokens stayed at each stage, what the prefill cost."""

    pruner: Pruner
    answer: Answer
    image_tokens: tuple[int, ...]  # that entered each layer
    stages: dict[int, tuple[int, ...]]  # layer -> numbers, among the prompt's image tokens, of those that stayed
    cost: Cost

    @property
    def steps(self) -> str:
        """The number of image tokens from stage to stage, such as ``576→288→72``."""
        counts = [self.image_tokens[0], *(len(kept) for kept in self.stages.values())]
        return "→".join(map(str, counts))

    def to_dict(self) -> dict[str, Any]:
        """The run in JSON's own types."""
        return {
            "pruner": self.pruner.to_dict(),
            "answer": asdict(self.answer),
            "image_tokens": list(self.image_tokens),
            "stages": {str(layer): list(kept) for layer, kept in self.stages.items()},
            "cost": self.cost.to_dict(),
        }


def ask(vlm: VLM, question: Question, pruner: Pruner, max_new_tokens: int) -> Run:
    """Answer a question greedily with ``pruner`` attached.

    Raises:
        ValueError: a pruner or model that do not fit (see ``attach``).
    """
    with prune(vlm.model, pruner) as trace:
        (answer,) = vlm.generate(vlm.encode([question]), max_new_tokens)
        image_tokens = tuple(counts[0] for counts in trace.image_tokens)
        number = trace.layout.image[0].cumsum(0) - 1
        stages = {
            stage.layer: tuple(number[trace.kept[stage.layer][0]].tolist())
            for stage in pruner.stages(trace.n_layers, image_tokens[0])
        }
        return Run(pruner, answer, image_tokens, stages, trace.cost())
