"""What the task files call by name: vlmflow's prompts, answer rules and figures on lmms-eval's documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from vlmflow.evaluate.rows import Row
from vlmflow.tasks import TASKS, Picture, Sample, Task, aokvqa, flickr30k, nocaps, pope, scienceqa
from vlmflow.tasks.sources import Record


@dataclass(frozen=True)
class Bridge:
    """A task for lmms-eval; ``read`` makes a sample of a row of its hub data set, ``figures`` are what is printed."""

    task: Task
    read: Callable[[Record], Sample]
    figures: tuple[str, ...] = ("accuracy", "unparsed")

    def sample(self, doc: Mapping[str, Any]) -> Sample:
        """Of a document, which comes without its image where only the answer counts."""
        known = {name: value for name, value in doc.items() if name != "image"}
        return self.read(Record(self.task.name, {"row": 0, **known}, Picture("image", lambda: doc["image"])))

    def images(self, doc: Mapping[str, Any]) -> list[Image.Image]:
        """``doc_to_visual``."""
        return [picture.open() for picture in self.sample(doc).images]

    def text(self, doc: Mapping[str, Any]) -> str:
        """``doc_to_text``: the paper's prompt."""
        return self.task.prompt(self.sample(doc))

    def target(self, doc: Mapping[str, Any]) -> str:
        """``doc_to_target``, for the record."""
        sample = self.sample(doc)
        return sample.answer or sample.references[0]

    def results(self, doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, dict[str, Any]]:
        """``process_results``: the answer's record, once for every figure, as each is made of all records."""
        outcome = self.task.outcome(self.sample(doc), answers[0])
        row = Row(outcome.sample, self.text(doc), outcome.answer, outcome.parsed, outcome.score)
        return dict.fromkeys(self.figures, row.to_dict())

    def measure(self, name: str, records: Sequence[Mapping[str, Any]]) -> float:
        """``aggregation``: a figure as ``vlmflow eval`` gives it."""
        outcomes = [Row.from_dict(record).outcome() for record in records]
        metric = self.task.measure(outcomes)
        unparsed = sum(outcome.parsed is None for outcome in outcomes)
        return {metric.name: metric.value, "unparsed": unparsed, **metric.details.get("overall", {})}[name]


BRIDGES = {
    "aokvqa": Bridge(TASKS["aokvqa"], aokvqa.from_hub),
    "scienceqa": Bridge(TASKS["scienceqa"], scienceqa.from_hub),
    "pope": Bridge(TASKS["pope"], pope.from_hub, ("accuracy", "precision", "recall", "f1", "yes_ratio", "unparsed")),
    "nocaps": Bridge(TASKS["nocaps"], nocaps.from_hub, ("CIDEr",)),
    "flickr30k": Bridge(TASKS["flickr30k"], flickr30k.from_hub, ("CIDEr",)),
}


def __getattr__(name: str) -> Callable[..., Any]:
    """``pope_text``, ``pope_accuracy`` and so on: a task file can only name what a module holds."""
    task, _, part = name.partition("_")
    if task not in BRIDGES or not part:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    bridge = BRIDGES[task]
    return partial(bridge.measure, part) if part in bridge.figures else getattr(bridge, part)
