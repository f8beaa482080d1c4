"""LLaVA-Bench (in the wild): 60 open questions about 24 images; a judge marks them beside text-only GPT-4's answers.

Source: LLaVA (NeurIPS 2023), judge's prompt Apache-2.0. Table 2 of the paper, which names GPT-4o as judge.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from vlmflow.tasks.core import Metric, Outcome, Rubric, marks_of, open_task
from vlmflow.tasks.prompts import question
from vlmflow.tasks.sample import Sample, TaskError
from vlmflow.tasks.sources import Hub, Record, Source, by_key, find_file, read_hub, read_lines, read_tsv

HUB = Hub("lmms-lab-encoder/llava-bench-in-the-wild", split="train", former="lmms-lab/llava-bench-in-the-wild")
CATEGORIES = ("conv", "detail", "complex")
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
TEMPLATE = (
    "[Context]\n{context}\n\n"
    "[Question]\n{question}\n\n"
    "[Assistant 1]\n{reference}\n\n[End of Assistant 1]\n\n"
    "[Assistant 2]\n{prediction}\n\n[End of Assistant 2]\n\n"
    "[System]\n"
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in the "
    "image is represented with a few sentences describing the image. \n"
    "Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an "
    "overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\n"
    "Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, "
    "respectively. The two scores are separated by a space.\n"
    "In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential "
    "bias and ensuring that the order in which the responses were presented does not affect your judgment."
    "\n\n"
)


def load(source: Source) -> Iterator[Sample]:
    """The hub, the official folder (questions, context and answers_gpt4 as JSON lines, images), or a VLMEvalKit TSV."""
    if source.path is None:
        for row in read_hub(HUB, source):
            yield _sample(row, row.text("question_id"), row.text("question"), row.texts("caption"), "gpt_answer")
        return
    path = find_file(source.path, "questions.jsonl")
    if path.suffix == ".tsv":
        for row in read_tsv(path):
            yield _sample(row, row.text("index"), row.text("question"), row.texts("caption"), "gpt4_ans")
        return
    folder = source.images or path.parent / "images"
    contexts = by_key(read_lines(find_file(path.parent / "context.jsonl")), "image")
    answers = by_key(read_lines(find_file(path.parent / "answers_gpt4.jsonl")), "question_id")
    for row in read_lines(path):
        key, name = row.text("question_id"), row.text("image")
        if key not in answers or name not in contexts:
            missing = "context.jsonl" if key in answers else "answers_gpt4.jsonl"
            raise TaskError(f"{row.origin}: question {key} (image {name}) has no entry in {missing}")
        whole = {**row.fields, "gpt_answer": answers[key].text("text")}
        pictured = Record(row.origin, whole, row.image_in([folder], name))
        yield _sample(pictured, key, row.text("text"), contexts[name].texts("caption"), "gpt_answer")


def _sample(row: Record, key: str, question: str, context: Sequence[str], reference: str) -> Sample:
    category = row.text("category")
    if category not in CATEGORIES:
        raise TaskError(f"{row.origin}: 'category' must be one of {', '.join(CATEGORIES)}, got {category!r:.40}")
    references = (row.text(reference),)
    return row.sample(key, question=question, references=references, context="\n".join(context), group=category)


def fill(sample: Sample, answer: str) -> dict[str, str]:
    """GPT-4's answer comes first, always."""
    return {
        "context": sample.context,
        "question": sample.question,
        "reference": sample.references[0],
        "prediction": answer,
    }


def read(reply: str) -> tuple[float, ...] | None:
    """The two marks from 1 to 10 on the reply's first line: the reference's, and the model's."""
    try:
        marks = tuple(float(mark) for mark in re.sub("[,;]", " ", reply.strip().split("\n")[0]).split())
    except ValueError:
        return None
    return marks if len(marks) == 2 and all(1 <= mark <= 10 for mark in marks) else None


def measure(outcomes: Sequence[Outcome]) -> Metric:
    """The model's marks in percent of the reference's: a ratio of means, overall and per category.

    Departs: LLaVA's script averages answers without marks in as -1; here they are left out and counted.
    """
    reference, mark = marks_of(outcomes, 2)
    metric = Metric("relative score", mark, reference)
    means = [float(marks[metric.counted].mean()) if metric.counted.any() else None for marks in (reference, mark)]
    metric.details.update(categories=metric.by_group(outcomes), reference_mark=means[0], mark=means[1])
    return metric


LLAVA_BENCH = open_task(
    name="llava_bench",
    title="LLaVA-Bench (in the wild)",
    load=load,
    prompts={"paper": question},
    measure=measure,
    max_new_tokens=1024,
    hub=HUB,
    rubric=Rubric(
        name="llava-bench-v1",
        template=TEMPLATE,
        fill=fill,
        read=read,
        max_tokens=1024,
        system=SYSTEM,
        temperature=0.2,
    ),
)
