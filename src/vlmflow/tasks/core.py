"""What a benchmark is made of: samples, prompts, answer rules, a score, and a figure with its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image

from vlmflow.core.images import as_rgb, open_image
from vlmflow.core.statistics import Interval, Resampled, clusters_of, mcnemar

Named = TypeVar("Named")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class TaskError(ValueError):
    """Bad input to a task, with the file and the row that it stands in."""


@dataclass(frozen=True)
class Picture:
    """An image that is opened when it is needed; its name tells it from others (two questions may share one)."""

    name: str
    content: Path | bytes | Callable[[], Image.Image] = field(repr=False, compare=False)

    def open(self) -> Image.Image:
        """The image as ``open_image`` reads it.

        Raises:
            ImageError: the file is missing, or no image that can be read.
        """
        if callable(self.content):
            return as_rgb(self.content(), self.name)
        return open_image(self.content, self.name)


@dataclass(frozen=True)
class Sample:
    """One question about images.

    ``answer`` is the right one as the answer rules give it (a letter, a word), ``references`` further texts it is
    compared with (captions), ``context`` what belongs to the question without being it (a hint; for a judge, the
    image in words), ``group`` the part of the benchmark, ``origin`` the file and row, for errors.
    """

    id: str
    images: tuple[Picture, ...]
    question: str = ""
    choices: tuple[str, ...] = ()
    answer: str = ""
    references: tuple[str, ...] = ()
    context: str = ""
    group: str = ""
    origin: str = field(default="", compare=False)


@dataclass(frozen=True)
class Source:
    """Where samples come from: a local copy if ``path`` is given, else the hub.

    ``images`` is the folder of a local copy's images where they do not lie beside it. ``hub`` is ``new`` or ``old``
    (the task's data set under its two names), or any other data set id or folder with the same columns, for which
    ``config`` then applies. ``split`` and ``revision`` replace the task's own.
    """

    path: Path | None = None
    images: Path | None = None
    hub: str = "new"
    config: str | None = None
    split: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Hub:
    """A data set on the hub: its id, the one it had before, and the part that is the benchmark."""

    new: str
    old: str
    split: str
    config: str | None = None

    def resolve(self, source: Source) -> Hub:
        """The data set that a source means; ``new`` and ``old`` are both its id then."""
        split = source.split or self.split
        if source.hub in ("new", "old"):
            known = self.new if source.hub == "new" else self.old
            return Hub(known, known, split, source.config or self.config)
        return Hub(source.hub, source.hub, split, source.config)


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
class Figure:
    """A benchmark's figure as ``scale`` times a ratio of sums over the outcomes, which every figure here is.

    ``numerator`` and ``denominator`` have one entry an outcome; both are nan where it is left out. ``details`` holds
    the other figures.
    """

    name: str
    numerator: np.ndarray
    denominator: np.ndarray
    details: dict[str, Any]
    scale: float = 100.0

    @property
    def counted(self) -> np.ndarray:
        """True for the outcomes that are not left out."""
        return ~np.isnan(self.numerator)

    def estimate(self, chosen: np.ndarray, images: np.ndarray, seed: int) -> Interval | None:
        """The figure of the chosen outcomes with its 95 % interval; None where none counts."""
        if not self.denominator[chosen].sum():
            return None
        columns = np.stack([self.numerator[chosen], self.denominator[chosen]], 1)
        return Resampled.sums(columns, images[chosen], seed).interval(_ratio).times(self.scale)


Prompt = Callable[[Sample], str]
Rule = Callable[[str, Sample], str | None]


@dataclass(frozen=True)
class Task:
    """A benchmark, whole.

    ``prompts`` and ``rules`` hold the prompt styles and answer rules by name; the first of each is the default.
    ``preset`` names HiMAP's settings for this kind of task (Table 3).
    """

    name: str
    title: str
    load: Callable[[Source], Iterator[Sample]]
    prompts: Mapping[str, Prompt]
    rules: Mapping[str, Rule]
    score: Callable[[str | None, Sample], float | None]
    measure: Callable[[Sequence[Outcome]], Figure]
    max_new_tokens: int
    preset: Literal["qa", "caption"]
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

    def describe(self, source: Source | None = None) -> dict[str, str]:
        """What a source means for this task, for records."""
        source = source or Source()
        asked = {"images": source.images, "split": source.split, "revision": source.revision}
        where: dict[str, object] = {"path": source.path}
        if source.path is None and self.hub:
            found = self.hub.resolve(source)
            where = {"dataset": found.new, "config": found.config}
            asked["split"] = found.split
        return {name: str(value) for name, value in {**where, **asked}.items() if value is not None}

    def marked_by(self) -> Rubric:
        """The rubric by which a judge marks the answers.

        Raises:
            TaskError: it needs none.
        """
        if self.rubric is None:
            raise TaskError(f"{self.name} is scored by its rules and needs no judge; leave the judge out")
        return self.rubric

    def prompt(self, sample: Sample, style: str | None = None) -> str:
        """The text that goes with the images.

        Raises:
            TaskError: unknown style.
        """
        return _named(self, "prompt style", self.prompts, style)(sample)

    def parse(self, answer: str, sample: Sample, rule: str | None = None) -> str | None:
        """The answer that a text gives, or None if it gives none.

        Raises:
            TaskError: unknown rule.
        """
        return _named(self, "answer rule", self.rules, rule)(answer, sample)

    def outcome(
        self, sample: Sample, answer: str, rule: str | None = None, verdict: tuple[float, ...] | None = None
    ) -> Outcome:
        """An answer, parsed and scored."""
        parsed = self.parse(answer, sample, rule)
        return Outcome(sample, answer, parsed, self.score(parsed, sample), verdict)

    def metric(self, outcomes: Sequence[Outcome], seed: int = 0) -> dict[str, Any]:
        """The figure with its 95 % interval (bootstrap over images), its counts and its details.

        ``unparsed`` answers count as wrong; ``excluded`` ones, on which no judgement came, are left out. Where
        nothing is left, value and interval are None.
        """
        if not outcomes:
            raise TaskError(f"{self.name}: no answers to measure")
        figure, images = self.measure(outcomes), _images(outcomes)
        counted = figure.counted
        estimate = figure.estimate(counted, images, seed)
        return {
            "task": self.name,
            "figure": figure.name,
            "value": estimate and estimate.value,
            "interval": estimate and [estimate.low, estimate.high],
            "n": int(counted.sum()),
            "images": len(np.unique(images[counted])),
            "unparsed": sum(outcome.parsed is None for outcome in outcomes),
            "excluded": int((~counted).sum()),
            **figure.details,
        }

    def parts(self, outcomes: Sequence[Outcome], seed: int = 0) -> dict[str, Interval | None]:
        """The figure of each group with its interval, as a part of the whole set's.

        None where nothing of the group is left. No group where there is no outcome.
        """
        if not outcomes:
            return {}
        figure, images = self.measure(outcomes), _images(outcomes)
        groups = np.array([outcome.sample.group for outcome in outcomes])
        names = dict.fromkeys(groups.tolist())
        return {name: figure.estimate(figure.counted & (groups == name), images, seed) for name in names}

    def compare(self, first: Sequence[Outcome], second: Sequence[Outcome], seed: int = 0) -> dict[str, Any]:
        """The second method's figure minus the first's, on the same samples.

        Gives the difference, its 95 % interval and p by the paired bootstrap over images and, where a score is
        right or wrong, p by McNemar's exact test, which takes questions as independent.

        Raises:
            TaskError: the two do not hold the same samples.
        """
        order = {outcome.sample.id: i for i, outcome in enumerate(second)}
        ids = [outcome.sample.id for outcome in first]
        if set(ids) != set(order) or len(ids) != len(order) or len(second) != len(order):
            odd = sorted(set(ids) ^ set(order))
            raise TaskError(
                f"{self.name}: the two methods answer different samples ({len(first)} and {len(second)}"
                + (f"; {odd[0]!r} is in one only)" if odd else ", some of them twice)")
            )
        a, b = self.measure(first), self.measure([second[order[own]] for own in ids])
        both = a.counted & b.counted
        pair = [(figure.numerator[both], figure.denominator[both]) for figure in (a, b)]
        images = _images(first)[both]
        binary = all(np.isin(top, (0, 1)).all() and (bottom == 1).all() for top, bottom in pair)
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


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _difference(sums: np.ndarray) -> np.ndarray:
    """The second ratio less the first."""
    return _ratio(sums[..., 2:]) - _ratio(sums[..., :2])


def letters(sample: Sample) -> str:
    """The letters that a sample's choices go by."""
    return LETTERS[: len(sample.choices)]


def options(sample: Sample, form: str = "({}) {}", between: str = " ") -> str:
    """A sample's choices with their letters."""
    return between.join(map(form.format, letters(sample), sample.choices))


def right(parsed: str | None, sample: Sample) -> float:
    """1 for the sample's answer, else 0."""
    return float(parsed is not None and parsed == sample.answer)


def unscored(parsed: str | None, sample: Sample) -> None:
    """No score for one answer alone: captions are weighed by the whole set, open answers marked by a judge."""


def accuracy(outcomes: Sequence[Outcome]) -> Figure:
    """The share of right answers, and the same in every group if there are several."""
    scores = np.array([outcome.score for outcome in outcomes], float)
    groups = np.array([outcome.sample.group for outcome in outcomes])
    names = sorted(set(groups.tolist()))
    parts = {name: 100 * float(scores[groups == name].mean()) for name in names}
    return Figure("accuracy", scores, np.ones(len(scores)), {"groups": parts} if len(parts) > 1 else {})


def _images(outcomes: Sequence[Outcome]) -> np.ndarray:
    """A number for each outcome's images: what the bootstrap draws, as questions about one image go together."""
    return clusters_of([tuple(picture.name for picture in outcome.sample.images) for outcome in outcomes])


def _named(task: Task, what: str, known: Mapping[str, Named], name: str | None) -> Named:
    if name is None:
        return next(iter(known.values()))
    if name not in known:
        raise TaskError(f"{task.name}: {what} must be one of {', '.join(known)}, got {name!r}")
    return known[name]
