"""Your own questions: one JSON object a line with image, question and answer."""

from __future__ import annotations

from collections.abc import Iterator

from vlmflow.tasks.answers import LETTER_RULES, letter, normal, words
from vlmflow.tasks.core import Task
from vlmflow.tasks.prompts import option_letter, options, short_answer
from vlmflow.tasks.sample import LETTERS, Sample, TaskError
from vlmflow.tasks.sources import Source, read_lines


def load(source: Source) -> Iterator[Sample]:
    """A JSON Lines file with the fields

    - ``image``: a file name or a list of them, in ``images`` or else beside the file (or an absolute path); an empty
      list for a question about no image;
    - ``question``;
    - ``answer``: the right answer, or a list of accepted ones; with choices a letter or a choice's text;
    - ``choices`` (optional): a list of texts, which makes the question multiple choice;
    - ``id`` and ``group`` (optional).
    """
    if source.path is None:
        raise TaskError("jsonl: needs the path of a JSON Lines file")
    folder = source.images or source.path.parent
    for number, row in enumerate(read_lines(source.path)):
        names = row.texts("image") if row.fields.get("image") != [] else ()
        images = tuple(row.image_in([folder], name) for name in names)
        choices = row.choices() if "choices" in row.fields else ()
        answer, *_ = accepted = row.texts("answer")
        if choices:
            letters = list(LETTERS[: len(choices)])
            if answer not in letters and choices.count(answer) != 1:
                raise TaskError(f"{row.origin}: 'answer' {answer!r:.40} is neither a letter nor one of the choices")
            answer = answer if answer in letters else letters[choices.index(answer)]
            accepted = ()
        yield Sample(
            id=row.text("id", str(number)),
            images=images,
            question=row.text("question"),
            choices=choices,
            answer=answer,
            references=accepted,
            group=row.text("group", ""),
            origin=row.origin,
        )


def plain_prompt(sample: Sample) -> str:
    """The question alone, and its choices if it has any."""
    if not sample.choices:
        return sample.question
    return f"{sample.question} Options: {options(sample)}. Answer with the option's letter."


def llava_prompt(sample: Sample) -> str:
    """LLaVA's for short answers and for multiple choice."""
    return option_letter(sample) if sample.choices else short_answer(sample)


def text_or_letter(text: str, sample: Sample) -> str | None:
    """The text on one line; of a multiple-choice question the letter."""
    return letter(text, sample) if sample.choices else words(text, sample)


def strict(text: str, sample: Sample) -> str | None:
    """The text on one line; of a multiple-choice question the letter, if the text is nothing else."""
    return LETTER_RULES["strict"](text, sample) if sample.choices else words(text, sample)


def score(parsed: str | None, sample: Sample) -> float:
    """1 for the letter, or for an accepted answer whatever its case, article and outer punctuation."""
    if parsed is None:
        return 0.0
    if sample.choices:
        return float(parsed == sample.answer)
    return float(normal(parsed) in [normal(accepted) for accepted in sample.references])


JSONL = Task(
    name="jsonl",
    title="Your own questions",
    load=load,
    prompts={"plain": plain_prompt, "llava": llava_prompt},
    rules={"text": text_or_letter, "strict": strict},
    score=score,
    max_new_tokens=64,
)
