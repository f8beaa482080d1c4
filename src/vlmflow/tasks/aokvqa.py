"""A-OKVQA, multiple choice, validation: 1,145 questions about COCO images that need knowledge.

Source: A-OKVQA (ECCV 2022). Table 1 of the paper.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlmflow.tasks.answers import LETTER_RULES
from vlmflow.tasks.core import Task
from vlmflow.tasks.prompts import option_letter, options
from vlmflow.tasks.sample import Sample, TaskError
from vlmflow.tasks.sources import Hub, Record, Source, find_file, read_hub, read_list, read_tsv, tsv_choices_and_answer

HUB = Hub("HuggingFaceM4/A-OKVQA", split="validation")


def load(source: Source) -> Iterator[Sample]:
    """The hub, aokvqa_v1p0_val.json with COCO 2017 images, or a VLMEvalKit TSV.

    The images lie in ``images``, or else beside the file, or in a folder ``val2017`` (the split's) of either. The
    test split has no public answers.
    """
    if source.path is None:
        yield from map(from_hub, read_hub(HUB, source))
        return
    path = find_file(source.path, f"aokvqa_v1p0_{source.split or 'val'}.json")
    if path.suffix == ".tsv":
        for row in read_tsv(path):
            yield _sample(row, row.text("index"), *tsv_choices_and_answer(row))
        return
    above = source.images or path.parent
    for row in read_list(path):
        folders = [above, above / f"{row.text('split')}2017"]
        yield from_hub(row.with_image(folders, f"{row.number('image_id'):012}.jpg"))


def from_hub(row: Record) -> Sample:
    """A row of the hub's data set, or of the official file."""
    if row.fields.get("correct_choice_idx") is None:
        raise TaskError(f"{row.origin}: no 'correct_choice_idx'; the test split has no public answers")
    return _sample(row, row.text("question_id"), *row.choices_and_answer("correct_choice_idx"))


def _sample(row: Record, key: str, choices: tuple[str, ...], answer: str) -> Sample:
    return row.sample(key, question=row.text("question"), choices=choices, answer=answer)


def paper_prompt(sample: Sample) -> str:
    """The paper's (appendix E), with the choices written as in FastV's script, whose sentence it is."""
    return (
        "Analyse the image and choose the best answer for the following question: "
        f"{sample.question} Options: {options(sample)}. Output the letter of the correct answer."
    )


def fastv_prompt(sample: Sample) -> str:
    """FastV's script."""
    return (
        "\nAnalyse the image and choose the best answer for the following question:\n"
        f"{sample.question}\nOptions: {options(sample)}\nJust output the letter of the correct answer."
    )


def fastv_rule(text: str, sample: Sample) -> str | None:
    """The right letter if the text holds it anywhere, as FastV's script scores (with one new token)."""
    return sample.answer if sample.answer in text else None


AOKVQA = Task(
    name="aokvqa",
    title="A-OKVQA (multiple choice, validation)",
    load=load,
    prompts={"paper": paper_prompt, "llava": option_letter, "fastv": fastv_prompt},
    rules={**LETTER_RULES, "fastv": fastv_rule},
    hub=HUB,
)
