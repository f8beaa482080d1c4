"""POPE on COCO: 9,000 questions whether an object is in one of 500 images, in three splits of 3,000.

The objects asked for that are not there are drawn evenly (random), from the frequent ones (popular), or from those
that go with what is there (adversarial).

Source: POPE (EMNLP 2023). Table 1 of the paper, which prints accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vlmflow.tasks.answers import YES_NO_RULES
from vlmflow.tasks.core import Metric, Outcome, Task
from vlmflow.tasks.prompts import short_answer
from vlmflow.tasks.sample import Sample, TaskError
from vlmflow.tasks.sources import Hub, Record, Source, existing, read_hub, read_lines, read_tsv

HUB = Hub("lmms-lab-encoder/POPE", split="test", former="lmms-lab/POPE")
SPLITS = ("random", "popular", "adversarial")


def load(source: Source) -> Iterator[Sample]:
    """The hub, POPE's JSON lines (one file, or a folder of the three) with COCO val2014 images, or a VLMEvalKit TSV.

    ``split`` chooses one of random, popular and adversarial from a folder; on the hub it names the hub's split. A file
    of another name is a group of its own. The images lie in ``images``, or else beside the file, or in a folder
    ``val2014`` of either.
    """
    if source.path is None:
        yield from map(from_hub, read_hub(HUB, source, image_name="image_source"))
        return
    if existing(source.path).suffix == ".tsv":
        for row in read_tsv(source.path):
            for group in row.text("category").split(","):
                yield _sample(row, f"{group}/{row.text('index')}", "question", "answer", group)
        return
    if source.split not in (None, *SPLITS):
        raise TaskError(f"pope: split must be one of {', '.join(SPLITS)}, got {source.split!r}")
    if source.path.is_dir():
        splits = [source.split] if source.split else SPLITS
        files = [(existing(source.path / f"coco_pope_{split}.json"), split) for split in splits]
    else:
        named = (split for split in SPLITS if source.path.stem.endswith(split))
        files = [(source.path, next(named, source.path.stem))]
    above = source.images or files[0][0].parent
    for path, group in files:
        for row in read_lines(path):
            pictured = row.with_image([above, above / "val2014"], row.text("image"))
            yield _sample(pictured, f"{group}/{row.text('question_id')}", "text", "label", group)


def from_hub(row: Record) -> Sample:
    """A row of the hub's data set."""
    group = row.text("category")
    return _sample(row, f"{group}/{row.text('row')}", "question", "answer", group)


def _sample(row: Record, key: str, question: str, answer: str, group: str) -> Sample:
    label = row.text(answer).strip().lower()
    if label not in ("yes", "no"):
        raise TaskError(f"{row.origin}: {answer!r} must be yes or no, got {label!r:.40}")
    return row.sample(key, question=row.text(question), answer=label, group=group)


def paper_prompt(sample: Sample) -> str:
    """The paper's (appendix E)."""
    return f"question: {sample.question} Please just answer yes or no."


def measure(outcomes: Sequence[Outcome]) -> Metric:
    """Accuracy, and per split and overall accuracy, precision, recall, F1 and the share of yes, in percent.

    An unparsed answer is wrong and no "yes". ``mean_f1`` is the plain mean over the splits, which is
    what LLaVA's table prints.
    """
    groups = dict.fromkeys(outcome.sample.group for outcome in outcomes)
    parts = {group: _figures([outcome for outcome in outcomes if outcome.sample.group == group]) for group in groups}
    mean_f1 = sum(part["f1"] for part in parts.values()) / len(parts)
    metric = Metric.mean("accuracy", np.array([outcome.score for outcome in outcomes], float))
    metric.details.update(overall=_figures(outcomes), splits=parts, mean_f1=mean_f1)
    return metric


def _figures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The positive class is yes; a ratio of nothing to nothing is 0."""
    truth = [outcome.sample.answer == "yes" for outcome in outcomes]
    said = [outcome.parsed == "yes" for outcome in outcomes]
    hits = sum(t and s for t, s in zip(truth, said, strict=True))
    shares = {
        "accuracy": (sum(outcome.parsed == outcome.sample.answer for outcome in outcomes), len(outcomes)),
        "precision": (hits, sum(said)),
        "recall": (hits, sum(truth)),
        "f1": (2 * hits, sum(said) + sum(truth)),
        "yes_ratio": (sum(said), len(outcomes)),
    }
    return {name: 100 * part / whole if whole else 0.0 for name, (part, whole) in shares.items()}


POPE = Task(
    name="pope",
    title="POPE (COCO; random, popular, adversarial)",
    load=load,
    prompts={"paper": paper_prompt, "llava": short_answer},
    rules=YES_NO_RULES,
    measure=measure,
    hub=HUB,
)
