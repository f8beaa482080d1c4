"""Prompts that several benchmarks share; what one alone asks stands in its file.

A style is named after who asks so: ``paper`` (HiMAP's appendix E), ``llava``, ``lmms`` (lmms-eval), ``fastv``, or
``plain`` where nobody but the data set does. A task has a style only where its text is another one.
"""

from __future__ import annotations

from collections.abc import Callable

from vlmflow.tasks.sample import Sample

Prompt = Callable[[Sample], str]

OPTION_LETTER = "Answer with the option's letter from the given choices directly."  # LLaVA's sentence
SAME_TEXT = {"lmms": ("llava", "paper"), "llava": ("paper",), "paper": ("plain",)}  # whose a style's text is


def options(sample: Sample, form: str = "({}) {}", between: str = " ") -> str:
    """A sample's choices with their letters."""
    return between.join(map(form.format, sample.letters, sample.choices))


def question(sample: Sample) -> str:
    """The question alone."""
    return sample.question


def short_answer(sample: Sample) -> str:
    """LLaVA's for short answers, which is lmms-eval's too."""
    return f"{sample.question}\nAnswer the question using a single word or phrase."


def option_letter(sample: Sample) -> str:
    """LLaVA's for multiple choice, which is lmms-eval's too."""
    return f"{sample.question}\n{options(sample, '{}. {}', chr(10))}\n{OPTION_LETTER}"


def caption(sample: Sample) -> str:
    """The paper's for captions, which is lmms-eval's."""
    return "Provide a one-sentence caption for the provided image."
