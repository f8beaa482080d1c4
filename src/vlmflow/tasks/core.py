"""What a benchmark is made of: samples, prompts, answer rules, a score, and a figure with its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np

from vlmflow.core.statistics import Interval, Resampled, clusters_of, mcnemar, share
from vlmflow.tasks.answers import Rule, words
from vlmflow.tasks.prompts import SAME_TEXT, Prompt
from vlmflow.tasks.sample import Sample, TaskError
from vlmflow.tasks.sources import Hub, Source


@dataclass(frozen=True)
class Rubric:
    """How a judge marks an open answer: what it is asked, and how its reply is read.

    ``template`` holds the names that ``fill`` gives. A reply that ``read`` cannot read is asked for again,
    with ``nudge`` after the question and ``hotter`` more temperature each time.
    """

    name: str
    template: str
    fill: Callable[[Sample, str], dict[str, str]]
    read: Callable[[str], tuple[float, ...] | None]
    max_tokens: int
    system: str | None = None
    nudge: str = ""
    temperature: float = 0.0
    hotter: float = 0.0

    def messages(self, sample: Sample, answer: str, again: bool = False) -> list[dict[str, str]]:
        """What the judge is sent."""
        content = self.template.format(**self.fill(sample, answer)) + (self.nudge if again else "")
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": content}]


@dataclass(frozen=True)
class Outcome:
    """A model's answer to a sample; ``parsed`` is None if the rule found no answer in it.

    ``score`` is None where one sample alone has none (captions), ``verdict`` a judge's marks, None if it gave none.
    """

    sample: Sample
    answer: str
    parsed: str | None
    score: float | None
    verdict: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Metric:
    """A benchmark's figure as ``scale`` times a ratio of sums over the outcomes, which every figure here is.

    ``numerator`` and ``denominator`` have one entry an outcome; both are nan where it is left out. ``details`` holds
    the other figures.
    """

    name: str
    numerator: np.ndarray
    denominator: np.ndarray
    details: dict[str, Any] = field(default_factory=dict)
    scale: float = 100.0

    @classmethod
    def mean(cls, name: str, scores: np.ndarray) -> Metric:
        """The mean of scores, one an outcome; nan where it is left out."""
        return cls(name, scores, np.where(np.isnan(scores), np.nan, 1.0))

    @property
    def counted(self) -> np.ndarray:
        """True for the outcomes that are not left out."""
        return ~np.isnan(self.numerator)

    @property
    def value(self) -> float | None:
        """The figure of all outcomes that are not left out."""
        return self.over(self.counted)

    def over(self, chosen: np.ndarray) -> float | None:
        """The figure of the chosen outcomes; None where none counts."""
        chosen = chosen & self.counted
        if not chosen.any():
            return None
        return self.scale * float(self.numerator[chosen].sum() / self.denominator[chosen].sum())

    def by_group(self, outcomes: Sequence[Outcome]) -> dict[str, float | None]:
        """The figure of each group, by name."""
        groups = groups_of(outcomes)
        return {name: self.over(groups == name) for name in sorted(set(groups.tolist()))}

    def estimate(self, chosen: np.ndarray, images: np.ndarray, seed: int) -> Interval | None:
        """The figure of the chosen outcomes with its 95 % interval; None where none counts."""
        chosen = chosen & self.counted
        if not chosen.any():
            return None
        scores, weights = self.numerator[chosen], self.denominator[chosen]
        if _right_or_wrong(scores, weights):
            return share(scores, images[chosen]).times(self.scale)
        return Resampled.sums(np.stack([scores, weights], 1), images[chosen], seed).interval(_ratio).times(self.scale)


def right(parsed: str | None, sample: Sample) -> float:
    """1 for the sample's answer, else 0."""
    return float(parsed is not None and parsed == sample.answer)


def unscored(parsed: str | None, sample: Sample) -> None:
    """No score for one answer alone: captions are weighed by the whole set, open answers marked by a judge."""


def mean_score(name: str, scores: Sequence[float | None], outcomes: Sequence[Outcome], **details: Any) -> Metric:
    """The mean score, and the same of every group if there are several."""
    metric = Metric.mean(name, np.array(scores, float))
    groups = metric.by_group(outcomes)
    metric.details.update(details, **{"groups": groups} if len(groups) > 1 else {})
    return metric


def accuracy(outcomes: Sequence[Outcome]) -> Metric:
    """The share of right answers, and the same of every group if there are several."""
    return mean_score("accuracy", [outcome.score for outcome in outcomes], outcomes)


@dataclass(frozen=True)
class Task:
    """A benchmark, whole; by default a question has one right answer, and the figure is the share of right ones.

    ``prompts`` and ``rules`` hold the prompt styles and answer rules by name; the first of each is the default.
    ``measure`` makes the benchmark's figure of the outcomes.
    ``preset`` names HiMAP's settings for this kind of task (Table 3).
    """

    name: str
    title: str
    load: Callable[[Source], Iterator[Sample]]
    prompts: Mapping[str, Prompt]
    rules: Mapping[str, Rule]
    score: Callable[[str | None, Sample], float | None] = right
    measure: Callable[[Sequence[Outcome]], Metric] = accuracy
    max_new_tokens: int = 16
    preset: Literal["qa", "caption"] = "qa"
    hub: Hub | None = None
    rubric: Rubric | None = None

    def samples(self, source: Source | None = None, limit: int | None = None) -> list[Sample]:
        """The samples, in the source's order; with ``limit`` the first ones only. Images are not opened yet.

        Raises:
            TaskError: what is wrong with the source, by file and row; also two samples of one id, or no sample.
            RecordError: a file that cannot be read, or is broken.
        """
        seen: dict[str, str] = {}
        samples: list[Sample] = []
        for sample in islice(self.load(source or Source()), limit):
            if sample.id in seen:
                raise TaskError(f"{sample.origin}: id {sample.id!r} is taken by {seen[sample.id]}")
            seen[sample.id] = sample.origin
            samples.append(sample)
        if not samples:
            raise TaskError(f"{self.name}: no samples in {self.describe(source)}")
        return samples

    def describe(self, source: Source | None = None, samples: Sequence[Sample] = ()) -> dict[str, str]:
        """What a source means for this task, for records; with its samples also the commit that they are of."""
        source = source or Source()
        where: dict[str, object] = {"path": source.path, "images": source.images, "split": source.split}
        if source.path is None and self.hub:
            hub = self.hub.resolve(source)
            where = {"dataset": hub.id, "config": hub.config, "images": source.images, "split": hub.split}
        where |= {"revision": source.revision, "commit": next((sample.commit for sample in samples), None)}
        return {name: str(value) for name, value in where.items() if value is not None}

    def marked_by(self) -> Rubric:
        """The rubric by which a judge marks the answers, or a ``TaskError`` where none is needed."""
        if self.rubric is None:
            raise TaskError(f"{self.name} is scored by its rules and needs no judge; leave the judge out")
        return self.rubric

    def style(self, name: str | None = None) -> str:
        """The prompt style that a name means here: lmms-eval's is LLaVA's where it is no other text, and so on.

        An unknown style is a ``TaskError``.
        """
        if name is not None and name not in self.prompts:
            name = next((same for same in SAME_TEXT.get(name, ()) if same in self.prompts), name)
        return _known(self, "prompt style", self.prompts, name)

    def prompt(self, sample: Sample, style: str | None = None) -> str:
        """The text that goes with the images, in a style (see ``style``)."""
        return self.prompts[self.style(style)](sample)

    def parse(self, answer: str, sample: Sample, rule: str | None = None) -> str | None:
        """The answer that a text gives, or None if it gives none; an unknown rule is a ``TaskError``."""
        return self.rules[_known(self, "answer rule", self.rules, rule)](answer, sample)

    def outcome(
        self, sample: Sample, answer: str, rule: str | None = None, verdict: tuple[float, ...] | None = None
    ) -> Outcome:
        """An answer, parsed and scored."""
        parsed = self.parse(answer, sample, rule)
        return Outcome(sample, answer, parsed, self.score(parsed, sample), verdict)

    def metric(self, outcomes: Sequence[Outcome], seed: int = 0) -> dict[str, Any]:
        """The figure with its 95 % interval over images (a share's, else a bootstrap's), its counts and its details.

        ``unparsed`` answers count as wrong; ``excluded`` ones, on which no judgement came, are left out. Where
        nothing is left, value and interval are None.
        """
        if not outcomes:
            raise TaskError(f"{self.name}: no answers to measure")
        metric, images = self.measure(outcomes), images_of(outcomes)
        counted = metric.counted
        estimate = metric.estimate(counted, images, seed)
        return {
            "task": self.name,
            "figure": metric.name,
            "value": estimate and estimate.value,
            "interval": estimate and [estimate.low, estimate.high],
            "n": int(counted.sum()),
            "images": len(np.unique(images[counted])),
            "unparsed": sum(outcome.parsed is None for outcome in outcomes),
            "excluded": int((~counted).sum()),
            **metric.details,
        }

    def parts(self, outcomes: Sequence[Outcome], seed: int = 0) -> dict[str, Interval | None]:
        """The figure of each group with its interval, as a part of the whole set's.

        None where nothing of the group is left. No group where there is no outcome.
        """
        if not outcomes:
            return {}
        metric, images, groups = self.measure(outcomes), images_of(outcomes), groups_of(outcomes)
        return {name: metric.estimate(groups == name, images, seed) for name in dict.fromkeys(groups.tolist())}

    def compare(self, first: Sequence[Outcome], second: Sequence[Outcome], seed: int = 0) -> dict[str, Any]:
        """The second method's figure minus the first's, on the same samples.

        Gives the difference, its 95 % interval and p by the paired bootstrap over images and, where a score is
        right or wrong, p by McNemar's exact test, which takes questions as independent.

        Raises:
            TaskError: the two do not hold the same samples.
        """
        by_id = {outcome.sample.id: outcome for outcome in second}
        ids = [outcome.sample.id for outcome in first]
        odd = sorted({*ids} ^ {*by_id})
        if odd or not len(ids) == len(by_id) == len(second):
            raise TaskError(
                f"{self.name}: the two methods answer different samples ({len(first)} and {len(second)}"
                + (f"; {odd[0]!r} is in one only)" if odd else ", some of them twice)")
            )
        a, b = self.measure(first), self.measure([by_id[key] for key in ids])
        both = a.counted & b.counted
        pair = [(metric.numerator[both], metric.denominator[both]) for metric in (a, b)]
        images = images_of(first)[both]
        binary = all(_right_or_wrong(top, bottom) for top, bottom in pair)
        record = {
            "task": self.name,
            "figure": a.name,
            "difference": None,
            "interval": None,
            "p_bootstrap": None,
            "p_mcnemar": mcnemar(pair[0][0] == 1, pair[1][0] == 1) if binary else None,
            "n": int(both.sum()),
            "images": len(np.unique(images)),
        }
        if all(bottom.sum() for _, bottom in pair):
            sums = Resampled.sums(np.stack([*pair[0], *pair[1]], 1), images, seed)
            difference = sums.interval(_difference).times(a.scale)
            record |= {"difference": difference.value, "interval": [difference.low, difference.high]}
            record["p_bootstrap"] = sums.p_of_zero(_difference)
        return record


# a benchmark of captions, or of answers that a judge marks
open_task = partial(Task, rules={"text": words}, score=unscored, preset="caption")


def _right_or_wrong(scores: np.ndarray, weights: np.ndarray) -> bool:
    """Whether each outcome counts once, as right or as wrong."""
    return bool(np.isin(scores, (0, 1)).all() and (weights == 1).all())


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _difference(sums: np.ndarray) -> np.ndarray:
    """The second ratio less the first."""
    return _ratio(sums[..., 2:]) - _ratio(sums[..., :2])


def groups_of(outcomes: Sequence[Outcome]) -> np.ndarray:
    """The group of each outcome's sample."""
    return np.array([outcome.sample.group for outcome in outcomes])


def marks_of(outcomes: Sequence[Outcome], count: int) -> np.ndarray:
    """A judge's marks, ``count`` an outcome: (mark, outcome); nan where it gave none."""
    return np.array([outcome.verdict or [np.nan] * count for outcome in outcomes], float).T


def images_of(outcomes: Sequence[Outcome]) -> np.ndarray:
    """A number for each outcome's images, by which intervals go, as questions about one image go together."""
    samples = [outcome.sample for outcome in outcomes]
    return clusters_of([tuple(picture.name for picture in sample.images) or sample.id for sample in samples])


def _known(task: Task, what: str, choices: Mapping[str, object], name: str | None) -> str:
    if name is None:
        return next(iter(choices))
    if name not in choices:
        raise TaskError(f"{task.name}: {what} must be one of {', '.join(choices)}, got {name!r}")
    return name
