"""An evaluation: a task's samples, answered under one pruner, and the task's figure of the answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, cast

from vlmflow.core.cost import Cost
from vlmflow.core.geometry import Geometry
from vlmflow.engine import prune
from vlmflow.evaluate.model_facts import ModelFacts, geometry_of
from vlmflow.evaluate.rows import Row, outcomes_of, rows_of, verdicts_of
from vlmflow.evaluate.shards import Shard, open_shards
from vlmflow.models import VLM, Question
from vlmflow.pruners import Pruner
from vlmflow.records.files import versions
from vlmflow.records.folder import Folder
from vlmflow.records.schema import EvaluationCounts, EvaluationSummary, SummedCost, to_json
from vlmflow.tasks import Sample, Source, Task

Price = Callable[[int, int, int], Cost | None]  # of a row's ``shape``


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated: a task's samples, with a prompt style, under a pruner.

    None stands for the task's first prompt style and answer rule, all its samples, its length of answers. ``seed``
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
    row_type = Row

    def samples(self) -> list[Sample]:
        """The samples (see ``Task.samples``)."""
        return self.task.samples(self.source, self.limit)

    def check(self, n_layers: int) -> None:
        """A ``ValueError`` where the pruner does not fit."""
        self.pruner.checked_stages(n_layers, 0)

    def settings(self, facts: ModelFacts, samples: Sequence[Sample]) -> dict[str, Any]:
        """All that an answer depends on (see ``settings_of``); a ``ValueError`` where the pruner does not fit."""
        self.check(facts.layers)
        method = {"pruner": self.pruner.to_dict(), "pruner_from": self.pruner_from}
        how = {name: getattr(self, name) for name in ("prompt", "rule", "limit", "max_new_tokens", "seed")}
        return settings_of(facts, self.task, self.source, samples, method, **how)

    def make_rows(self, vlm: VLM, samples: Sequence[Sample], shards: Sequence[Shard]) -> Iterator[list[Row]]:
        """The wanted rows of each shard, answered here one after the other."""
        price = _prices(self.pruner, geometry_of(vlm))
        with prune(vlm.model, self.pruner):
            pass  # a model that cannot be served is refused here, and not sample by sample
        for batch in open_shards(shards, samples, self.task, self.prompt):
            rows, failures = batch.ask(partial(self._answered, vlm, price))
            yield [
                rows[sample.id]
                if sample.id in rows
                else Row(sample, self.task.prompt(sample, self.prompt), failure=failures[sample.id])
                for sample in batch.wanted
            ]

    def _answered(self, vlm: VLM, price: Price, samples: Sequence[Sample], questions: Sequence[Question]) -> list[Row]:
        """The rows of a batch, answered in a session of its own: a text alone is then what the trace is of."""
        with prune(vlm.model, self.pruner) as trace:
            answers = vlm.answer(questions, self.max_new_tokens or self.task.max_new_tokens)
        by_layer, tokens = trace.image_tokens, trace.tokens[0]
        question_tokens = trace.layout.question.sum(1).tolist()
        rows = []
        for i, (sample, question, answer) in enumerate(zip(samples, questions, answers, strict=True)):
            counts = [layer[i] for layer in by_layer]
            outcome = self.task.outcome(sample, answer.text, self.rule)
            row = Row(
                sample=sample,
                prompt=question.text,
                answer=answer.text,
                parsed=outcome.parsed,
                score=outcome.score,
                answer_tokens=answer.tokens,
                tokens=tokens[i],
                question_tokens=question_tokens[i],
                image_tokens={n: count for n, count in enumerate(counts) if n == 0 or count != counts[n - 1]},
            )
            cost = price(*row.shape)
            rows.append(replace(row, cost=cost and _pruned_figures(cost)))
        return rows

    def sum_up(self, folder: Folder, settings: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """The summary of a folder's rows: the figure, means and cost of the samples that were answered."""
        rows = rows_of(folder).read().values()
        good = [row for row in rows if row.failure is None]
        failed = {row.id: row.failure for row in rows if row.failure is not None}
        counts = [row.by_layer(facts.layers) for row in good]
        price = _prices(self.pruner, facts.geometry)
        costs = [cost for row in good if (cost := price(*row.shape)) is not None]
        cost = sum(costs[1:], costs[0]) if costs else None
        summary = EvaluationSummary(
            settings=dict(settings),
            **self.metric(folder),
            samples=EvaluationCounts(asked=len(rows), answered=len(good), failed=len(failed)),
            failed=failed,
            answer_tokens=_mean([row.answer_tokens for row in good]),
            tokens=_mean([row.tokens for row in good]),
            image_tokens=[sum(layer) / len(layer) for layer in zip(*counts, strict=True)],
            cost=cost and cast(SummedCost, {"table": cost.table(), **cost.to_dict()}),
        )
        return to_json(summary)

    def metric(self, folder: Folder) -> dict[str, Any]:
        """The task's figure of a folder's rows, and the judge whose marks are in it; None for what there is not."""
        outcomes, judged = outcomes_of(folder), verdicts_of(folder)
        metric = self.task.metric(outcomes, self.seed) if outcomes else None
        return {"metric": metric, "judge": judged and judged["judge"]}


def settings_of(
    facts: ModelFacts,
    task: Task,
    source: Source,
    samples: Sequence[Sample],
    method: Mapping[str, Any],
    *,
    prompt: str | None = None,
    rule: str | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """All that an answer depends on; two runs with the same settings give the same summary.

    ``method`` says what is done to the model. Batch size, device and who answers are not among them, as they change no
    more than the last bits of a logit.

    Raises:
        TaskError: unknown prompt style or answer rule.
    """
    task.parse("", samples[0], rule)
    content = hashlib.sha256()
    for sample in samples:
        question = [sample.id, [picture.name for picture in sample.images], task.prompt(sample, prompt)]
        right = [sample.choices, sample.answer, sample.references, sample.group]
        content.update(json.dumps([*question, *right]).encode())
    return {
        "model": facts.name,
        "commit": facts.commit,
        "weights": facts.weights,
        "layers": facts.layers,
        "dtype": facts.dtype,
        "attention": facts.attention,
        "task": task.name,
        "source": task.describe(source, samples),
        "samples": {"count": len(samples), "sha256": content.hexdigest()},
        "limit": limit,
        "prompt": task.style(prompt),
        "rule": rule or next(iter(task.rules)),
        **method,
        "max_new_tokens": max_new_tokens or task.max_new_tokens,
        "decoding": "greedy",
        "seed": seed,
        "versions": versions(),
    }


def _prices(pruner: Pruner, geometry: Geometry | None) -> Price:
    """What prefills cost, pruned and not, each shape worked out once; None for a model whose widths are not known."""
    return cache(partial(pruner.cost, geometry)) if geometry else lambda *shape: None


def _pruned_figures(cost: Cost) -> dict[str, Any]:
    """The pruned prefill's figures, and their shares of the unpruned prefill's, for a row."""
    table = cost.table()
    pruned = {name: part for name, (_, part, _) in table.items()}
    return pruned | {"shares": {name: share for name, (_, _, share) in table.items()}}


def _mean(values: Sequence[int]) -> float | None:
    return sum(values) / len(values) if values else None
