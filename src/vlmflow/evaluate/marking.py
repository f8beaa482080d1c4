"""A finished evaluation's open answers, marked by a judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlmflow.evaluate.evaluation import Evaluation
from vlmflow.evaluate.judge import Judge
from vlmflow.evaluate.rows import rows_of, verdicts_of
from vlmflow.records.files import RecordError, write_json
from vlmflow.records.folder import SUMMARY, VERDICTS, Folder, claim, differences
from vlmflow.tasks import Sample


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
        summary |= evaluation.metric(folder)
        write_json(out / SUMMARY, summary)
        return summary


def write_requests(out: Path, evaluation: Evaluation, judge: Judge, samples: Sequence[Sample]) -> int:
    """Write what ``mark`` would send to ``out/requests.jsonl``; how many requests.

    Raises:
        TaskError: a task without a rubric.
    """
    return judge.dry_run(evaluation.task.marked_by(), _to_mark(Folder(out), samples), out / "requests.jsonl")


def _to_mark(folder: Folder, samples: Sequence[Sample]) -> list[tuple[Sample, str]]:
    """The samples that were answered, with their answers."""
    rows = rows_of(folder).read()
    return [(sample, rows[sample.id].answer) for sample in samples if rows[sample.id].failure is None]
