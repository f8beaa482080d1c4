"""ScienceQA, test questions with an image ("Sci-VQA"): 2,017 multiple-choice questions of school science.

Source: ScienceQA (NeurIPS 2022); data CC BY-NC-SA 4.0. Table 1 of the paper.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from vlmflow.tasks.answers import LETTER_RULES
from vlmflow.tasks.core import Task
from vlmflow.tasks.prompts import OPTION_LETTER, option_letter, options
from vlmflow.tasks.sample import LETTERS, Sample, TaskError
from vlmflow.tasks.sources import (
    Hub,
    Record,
    Source,
    find_file,
    read_hub,
    read_list,
    read_table,
    read_tsv,
    tsv_choices_and_answer,
)

HUB = Hub("lmms-lab-encoder/ScienceQA", split="test", config="ScienceQA-IMG", former="lmms-lab/ScienceQA")


def load(source: Source) -> Iterator[Sample]:
    """The hub, a folder with problems.json, the paper's JSON list of conversations, or a VLMEvalKit TSV.

    Questions without an image are passed over. Where a file names images only, they lie below ``images``, or else
    beside the file, in ``images`` or ``images/test``.
    """
    if source.path is None:
        yield from (from_hub(row) for row in read_hub(HUB, source) if row.picture)
        return
    path = find_file(source.path, "problems.json", "himap-inference-MCQ.json")
    if path.suffix == ".tsv":
        for row in read_tsv(path):
            yield _sample(row, row.text("index"), *tsv_choices_and_answer(row))
        return
    above = source.images or path.parent
    folders = [above, above / "test", above / "images" / "test", above / "images"]
    if path.name == "problems.json":
        split = source.split or "test"
        for row in read_table(path):
            if row.text("split") == split and (name := row.text("image", "")):
                key = row.text("key")
                pictured = row.with_image([folder / key for folder in folders], name)
                yield _sample(pictured, key, *row.choices_and_answer("answer"))
        return
    for row in read_list(path):
        yield _from_conversation(row.with_image(folders, row.text("image")))


def from_hub(row: Record) -> Sample:
    """A row of the hub's data set."""
    return _sample(row, row.text("row"), *row.choices_and_answer("answer"))


def _sample(row: Record, key: str, choices: tuple[str, ...], answer: str) -> Sample:
    question, context = row.text("question"), row.text("hint", "")
    return row.sample(key, question=question, choices=choices, answer=answer, context=context)


def _from_conversation(row: Record) -> Sample:
    """A record of the paper's file: "<image>", the context if there is one, the question, one line a choice.

    The question is the line before the choices; what stands between "Context: " and it is the context.
    """
    turns = [turn.text("value") for turn in row.rows("conversations")]
    if len(turns) != 2:
        raise TaskError(f"{row.origin}: 'conversations' must be a question and its answer, got {len(turns)} turns")
    lines = turns[0].replace("<image>", "").strip().split("\n")
    first = next((i for i, line in enumerate(lines) if re.match(r"A\. ", line)), len(lines))
    choices = lines[first:]
    if not choices or [line[:3] for line in choices] != [f"{mark}. " for mark in LETTERS[: len(choices)]]:
        raise TaskError(f"{row.origin}: the question must end in lines 'A. ...', 'B. ...', got {turns[0]!r:.120}")
    context, question = "", "\n".join(lines[:first])
    if question.startswith("Context: ") and "\n" in question:
        context, question = question.removeprefix("Context: ").rsplit("\n", 1)
    if turns[1].strip() not in list(LETTERS[: len(choices)]):
        raise TaskError(f"{row.origin}: the answer is {turns[1]!r:.40}, but there are {len(choices)} choices")
    texts, answer = tuple(line[3:] for line in choices), turns[1].strip()
    return row.sample(row.text("id"), question=question, choices=texts, answer=answer, context=context)


def paper_prompt(sample: Sample) -> str:
    """The paper's (appendix E); its {question} begins with the context, as in the file its code reads."""
    return f"{_with_context(sample).question} Options: {options(sample)}. {OPTION_LETTER}"


def llava_prompt(sample: Sample) -> str:
    """LLaVA's, which lmms-eval and the paper's released script share."""
    return option_letter(_with_context(sample))


def _with_context(sample: Sample) -> Sample:
    """The sample with its context as the head of its question."""
    context = f"Context: {sample.context}\n" if sample.context else ""
    return replace(sample, question=f"{context}{sample.question}")


SCIENCEQA = Task(
    name="scienceqa",
    title="Sci-VQA (ScienceQA test, questions with an image)",
    load=load,
    prompts={"paper": paper_prompt, "llava": llava_prompt},
    rules=LETTER_RULES,
    hub=HUB,
)
