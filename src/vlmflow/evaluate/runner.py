"""Answer a task's samples in batches under one pruner, write each row as it comes, and sum up."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmflow.core.cost import Cost
from vlmflow.core.errors import typed_line
from vlmflow.core.geometry import Geometry
from vlmflow.engine import Trace, attach
from vlmflow.evaluate.judge import Judge
from vlmflow.evaluate.rows import Row, outcomes_of, rows_of, verdicts_of
from vlmflow.models import VLM, Question
from vlmflow.pruners import Pruner
from vlmflow.records.files import RecordError, versions, write_json
from vlmflow.records.folder import SUMMARY, VERDICTS, Folder, OpenFolder, claim, differences
from vlmflow.tasks import Sample, Source, Task

FAILURES_IN_A_ROW = 50  # after so many something is wrong with more than the samples

Progress = Callable[[int, int, Row | None], None]  # samples done, of how many, and the row that came; None to begin


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated: a task's samples, asked in one way, under one pruner.

    None stands for the task's own: its first prompt style and answer rule, all samples, its length of answers. ``seed``
    is the bootstrap's; answers are greedy. ``pruner_from`` says for the record who chose the pruner's fields.
    """

    task: Task
    pruner: Pruner
    pruner_from: str = "given"
    source: Source = field(default_factory=Source)
    prompt: str | None = None
    rule: str | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    seed: int = 0

    def samples(self) -> list[Sample]:
        """The samples that are asked.

        Raises:
            TaskError: what is wrong with the source.
        """
        return self.task.samples(self.source, self.limit)

    def settings(self, subject: Subject, samples: Sequence[Sample]) -> dict[str, Any]:
        """All that an answer depends on; two runs with the same settings give the same summary.

        Batch size, device and who answers are not among them, as they change no more than the last bits of a logit.

        Raises:
            TaskError: unknown prompt style or answer rule.
        """
        self.task.parse("", samples[0], self.rule)
        content = hashlib.sha256()
        for sample in samples:
            asked = [sample.id, [picture.name for picture in sample.images], self.task.prompt(sample, self.prompt)]
            right = [sample.choices, sample.answer, sample.references, sample.group]
            content.update(json.dumps([*asked, *right]).encode())
        return {
            "model": subject.name,
            "weights": subject.weights,
            "layers": subject.layers,
            "dtype": subject.dtype,
            "attention": subject.attention,
            "task": self.task.name,
            "source": self.task.describe(self.source),
            "samples": {"count": len(samples), "sha256": content.hexdigest()},
            "limit": self.limit,
            "prompt": self.task.style(self.prompt),
            "rule": self.rule or next(iter(self.task.rules)),
            "pruner": self.pruner.to_dict(),
            "pruner_from": self.pruner_from,
            "max_new_tokens": self.max_new_tokens or self.task.max_new_tokens,
            "decoding": "greedy",
            "seed": self.seed,
            "versions": versions(),
        }


@dataclass(frozen=True)
class Subject:
    """What records and prices need to know of a model, so that whoever keeps the rows need not hold it.

    ``weights`` is their fingerprint; ``geometry`` is None where the model's widths are not known.
    """

    name: str
    weights: str
    layers: int
    dtype: str
    attention: str
    geometry: Geometry | None

    @classmethod
    def of(cls, vlm: VLM) -> Subject:
        """Read it off a model."""
        model = vlm.model
        return cls(
            name=vlm.name,
            weights=fingerprint(model),
            layers=vlm.n_layers,
            dtype=str(model.dtype).removeprefix("torch."),
            attention=model.config.get_text_config(decoder=True)._attn_implementation,
            geometry=_geometry(vlm),
        )


@dataclass(frozen=True)
class Shard:
    """Consecutive samples that are answered in one padded batch, whoever answers it.

    They are the ``first`` to the one before ``end``; of those in ``missing``, by id, rows are wanted.
    """

    first: int
    end: int
    missing: tuple[str, ...]

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Shard:
        """From its fields in JSON's own types."""
        return cls(record["first"], record["end"], tuple(record["missing"]))


Answers = Callable[[Sequence[Shard]], Iterator[list[Row]]]  # the rows of each shard, in whichever order they come


def missing_shards(samples: Sequence[Sample], answered: Collection[str], batch_size: int) -> list[Shard]:
    """The shards of which rows are missing; a batch is the same one in every run, so that its answers are too."""
    shards = []
    for first in range(0, len(samples), batch_size):
        batch = samples[first : first + batch_size]
        missing = tuple(sample.id for sample in batch if sample.id not in answered)
        if missing:
            shards.append(Shard(first, first + len(batch), missing))
    return shards


def fingerprint(model: nn.Module) -> str:
    """A digest of a few weights of every parameter: tells checkpoints apart without reading them whole."""
    digest = hashlib.sha256()
    for name, weight in list(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        few = (_offloaded(model, name) if weight.is_meta else weight).detach().flatten()[:16].float().cpu()
        digest.update(few.numpy().tobytes())
    return digest.hexdigest()


def _offloaded(model: nn.Module, name: str) -> torch.Tensor:
    """A weight that accelerate keeps in memory or on disk until its module runs."""
    from accelerate.utils import align_module_device

    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    with align_module_device(module):
        return module.get_parameter(own)


def run(
    vlm: VLM,
    evaluation: Evaluation,
    out: Path,
    *,
    batch_size: int = 8,
    samples: Sequence[Sample] | None = None,
    progress: Progress = lambda done, total, row: None,
) -> dict[str, Any]:
    """Evaluate into a folder, or go on where a run with the same settings stopped; the summary.

    ``samples`` saves loading them once more where many pruners are run. The rest is as in ``collect``.
    """
    samples = evaluation.samples() if samples is None else samples
    evaluation.pruner.checked_stages(vlm.n_layers, 0)
    answering = partial(answers, vlm, evaluation, samples)
    where = machine(vlm)
    return collect(Subject.of(vlm), answering, evaluation, samples, out, batch_size, where, progress)


def collect(
    subject: Subject,
    answering: Answers,
    evaluation: Evaluation,
    samples: Sequence[Sample],
    out: Path,
    batch_size: int,
    where: Mapping[str, Any],
    progress: Progress = lambda done, total, row: None,
) -> dict[str, Any]:
    """Keep the rows as they come from wherever they are answered, and sum them up; the summary.

    Shards are ``batch_size`` consecutive samples, left-padded. One that was cut short is answered whole again, so that
    a run that was killed ends as one that was not. Samples that failed are asked again when the run is started again.
    ``where`` is for the log.

    Raises:
        TaskError: what is wrong with the source, the prompt style or the answer rule.
        RecordError: the folder holds another run, or too many samples in a row have failed. Rows stay.
        ValueError: a pruner or model that do not fit (see ``attach``).
    """
    if batch_size < 1:
        raise RecordError(f"batch_size must be at least 1, got {batch_size}")
    settings = evaluation.settings(subject, samples)
    with claim(out, settings) as folder:
        answered = {key for key, row in rows_of(folder).read().items() if row.failure is None}
        shards = missing_shards(samples, answered, batch_size)
        done, start = len(answered), time.time()
        progress(done, len(samples), None)
        if shards:
            (out / SUMMARY).unlink(missing_ok=True)  # it would not be that of the rows to come
            folder.log({"event": "start", "time": start, "done": done, "batch_size": batch_size, **where})
        bad = 0
        for rows in answering(shards):
            rows_of(folder).append(rows)
            for row in rows:
                done += 1
                bad = 0 if row.failure is None else bad + 1
                progress(done, len(samples), row)
            if bad >= FAILURES_IN_A_ROW:
                reason = rows[-1].failure
                raise RecordError(f"{bad} samples in a row failed ({reason}); the rows so far are in {out}")
        if shards:
            folder.log({"event": "end", "time": time.time(), "done": done, "seconds": time.time() - start})
        rows_of(folder).put_in_order([sample.id for sample in samples])
        return _sum_up(folder, evaluation, folder.settings(), subject)


def mark(out: Path, evaluation: Evaluation, judge: Judge, samples: Sequence[Sample]) -> dict[str, Any]:
    """Have a judge mark a finished run's answers; the new summary. The judge's replies are kept in ``out/judge``.

    Raises:
        TaskError: a task without a rubric, no key, no client library, or a key or model that the endpoint refuses.
        RecordError: a run that is not finished, or whose answers another judge has marked.
    """
    rubric = evaluation.task.marked_by()
    record, summary = judge.to_dict(rubric), Folder(out).summary()
    with claim(out, summary["settings"]) as folder:
        earlier = verdicts_of(folder)
        if earlier and (differing := differences(earlier["judge"], record)):
            raise RecordError(
                f"{out} holds the marks of another judge: {'; '.join(differing)}. Copy the folder without {VERDICTS}, "
                "and have the copy marked"
            )
        verdicts = {
            verdict.sample: {name: value for name, value in asdict(verdict).items() if name not in ("sample", "asked")}
            for verdict in judge.mark(rubric, _to_mark(folder, samples))
        }
        write_json(out / VERDICTS, {"judge": record, "verdicts": verdicts})
        summary |= _figures(folder, evaluation)
        write_json(out / SUMMARY, summary)
        return summary


def write_requests(out: Path, evaluation: Evaluation, judge: Judge, samples: Sequence[Sample]) -> int:
    """Write what ``mark`` would send to ``out/requests.jsonl``; how many requests.

    Raises:
        TaskError: a task without a rubric.
    """
    return judge.dry_run(evaluation.task.marked_by(), _to_mark(Folder(out), samples), out / "requests.jsonl")


def _to_mark(folder: Folder, samples: Sequence[Sample]) -> list[tuple[Sample, str]]:
    rows = rows_of(folder).read()
    return [(sample, rows[sample.id].answer) for sample in samples if rows[sample.id].failure is None]


def answers(
    vlm: VLM, evaluation: Evaluation, samples: Sequence[Sample], shards: Sequence[Shard]
) -> Iterator[list[Row]]:
    """The rows of shards, answered here one after the other; the next one's images are opened meanwhile."""
    if not shards:
        return
    pricing = Pricing(evaluation.pruner, _geometry(vlm))
    with attach(vlm.model, evaluation.pruner) as trace, ThreadPoolExecutor(1) as pool:
        opening = pool.submit(Opened.open, evaluation, samples, shards[0])
        for shard, following in zip(shards, (*shards[1:], None), strict=True):
            opened = opening.result()
            if following is not None:
                opening = pool.submit(Opened.open, evaluation, samples, following)
            rows = dict(opened.failed)
            if not opened.questions.keys().isdisjoint(shard.missing):  # else what failed has failed again
                rows |= answer(vlm, evaluation, opened, trace, pricing)
            yield [rows[key] for key in shard.missing]


@dataclass(frozen=True)
class Opened:
    """A batch with its images: by sample id the questions to ask, and the rows of samples that have failed already."""

    batch: Sequence[Sample]
    questions: dict[str, Question]
    failed: dict[str, Row]

    @classmethod
    def open(cls, evaluation: Evaluation, samples: Sequence[Sample], shard: Shard) -> Opened:
        """Read the images of a shard."""
        batch = samples[shard.first : shard.end]
        opened = cls(batch, {}, {})
        for sample in batch:
            prompt = evaluation.task.prompt(sample, evaluation.prompt)
            try:
                pictures = tuple(picture.open() for picture in sample.images)
                opened.questions[sample.id] = Question(prompt, pictures)
            except Exception as error:  # whatever an image reader raises: this sample has failed
                opened.failed[sample.id] = Row(sample, prompt, failure=typed_line(error))
        return opened


def answer(vlm: VLM, evaluation: Evaluation, opened: Opened, trace: Trace, pricing: Pricing) -> dict[str, Row]:
    """A row for each question of a batch by sample id, inside the session that ``trace`` belongs to."""
    rows: dict[str, Row] = {}
    asked = [sample for sample in opened.batch if sample.id in opened.questions]
    for part in (asked, *([sample] for sample in asked)):  # one by one where the batch as a whole fails
        if part[0].id in rows:
            continue
        questions = [opened.questions[sample.id] for sample in part]
        try:
            answers = _ask(vlm, evaluation, part, questions, trace, pricing)
            rows |= {row.sample.id: row for row in answers}
        except Exception as error:  # too little memory, a processor that refuses: which sample, shows by itself
            if len(part) == 1:
                rows[part[0].id] = Row(part[0], questions[0].text, failure=typed_line(error))
    return rows


def _ask(
    vlm: VLM,
    evaluation: Evaluation,
    samples: Sequence[Sample],
    questions: Sequence[Question],
    trace: Trace,
    pricing: Pricing,
) -> list[Row]:
    task = evaluation.task
    answers = vlm.generate(vlm.encode(questions), evaluation.max_new_tokens or task.max_new_tokens)
    by_layer, tokens = trace.image_tokens, trace.tokens[0]
    asking = trace.layout.question.sum(1).tolist()
    rows = []
    for i, (sample, question, said) in enumerate(zip(samples, questions, answers, strict=True)):
        counts = [layer[i] for layer in by_layer]
        outcome = task.outcome(sample, said.text, evaluation.rule)
        row = Row(
            sample=sample,
            prompt=question.text,
            answer=said.text,
            parsed=outcome.parsed,
            score=outcome.score,
            answer_tokens=said.tokens,
            tokens=tokens[i],
            question_tokens=asking[i],
            image_tokens={n: count for n, count in enumerate(counts) if n == 0 or count != counts[n - 1]},
        )
        rows.append(replace(row, cost=pricing.shown(row)))
    return rows


class Pricing:
    """What rows cost under a pruner; samples of one shape are priced once."""

    def __init__(self, pruner: Pruner, geometry: Geometry | None) -> None:
        self._pruner, self._geometry = pruner, geometry
        self._known: dict[tuple[int, int, int], Cost] = {}

    def cost(self, row: Row) -> Cost | None:
        """One prefill's cost, pruned and not."""
        if self._geometry is None or row.image_tokens is None:
            return None
        image = row.image_tokens[0]
        shape = (image, row.tokens - image, row.question_tokens)
        if shape not in self._known:
            self._known[shape] = self._pruner.cost(self._geometry, *shape)
        return self._known[shape]

    def shown(self, row: Row) -> dict[str, Any] | None:
        """The figures for a row's record."""
        cost = self.cost(row)
        if cost is None:
            return None
        table = cost.table()
        pruned = {name: figures[1] for name, figures in table.items()}
        return pruned | {"shares": {name: figures[2] for name, figures in table.items()}}

    def total(self, rows: Iterable[Row]) -> Cost | None:
        """All rows' cost together, None where one is not known."""
        total: Cost | None = None
        for row in rows:
            cost = self.cost(row)
            if cost is None:
                return None
            total = cost if total is None else total + cost
        return total


def _sum_up(
    folder: OpenFolder, evaluation: Evaluation, settings: Mapping[str, Any], subject: Subject
) -> dict[str, Any]:
    rows = rows_of(folder).read().values()
    good = [row for row in rows if row.failure is None]
    failed = {row.sample.id: row.failure for row in rows if row.failure is not None}
    counts = [_by_layer(row, subject.layers) for row in good]
    cost = Pricing(evaluation.pruner, subject.geometry).total(good)
    summary = {
        "settings": settings,
        **_figures(folder, evaluation),
        "samples": {"asked": len(rows), "answered": len(good), "failed": len(failed)},
        "failed": failed,
        "answer_tokens": _mean(row.answer_tokens for row in good),
        "tokens": _mean(row.tokens for row in good),
        "image_tokens": [_mean(layer) for layer in zip(*counts, strict=True)],
        "cost": cost and {"table": cost.table(), **cost.to_dict()},
    }
    write_json(folder.path / SUMMARY, summary)
    return json.loads(json.dumps(summary))


def _figures(folder: Folder, evaluation: Evaluation) -> dict[str, Any]:
    outcomes, judged = outcomes_of(folder), verdicts_of(folder)
    metric = evaluation.task.metric(outcomes, evaluation.seed) if outcomes else None
    return {"metric": metric, "judge": judged and judged["judge"]}


def _by_layer(row: Row, n_layers: int) -> list[int]:
    changes, counts = row.image_tokens or {}, []
    for layer in range(n_layers):
        counts.append(changes[layer] if layer in changes else counts[-1])
    return counts


def _mean(values: Iterable[int]) -> float | None:
    held = list(values)
    return sum(held) / len(held) if held else None


def _geometry(vlm: VLM) -> Geometry | None:
    try:
        return Geometry.from_config(vlm.model.config)
    except ValueError:
        return None


def machine(vlm: VLM) -> dict[str, Any]:
    """Where a model runs."""
    device = vlm.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": str(device), "machine": name}
