"""easy-VQA, test: 9,673 questions about 1,000 pictures of one coloured shape; all of it in a package, so no download.

Source: easy-VQA 1.0 on PyPI, MIT. Not in the paper: an offline benchmark.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlmflow.tasks.answers import one_of_choices
from vlmflow.tasks.core import Task
from vlmflow.tasks.prompts import question, short_answer
from vlmflow.tasks.sample import Picture, Sample, TaskError
from vlmflow.tasks.sources import Source


def load(source: Source) -> Iterator[Sample]:
    """The installed package; a path cannot be given. ``split`` is test, or train.

    Groups: yes/no questions, and those for a shape or a colour.
    """
    if source.path is not None:
        raise TaskError("easy_vqa: is read from its package; it takes no path")
    try:
        import easy_vqa as package
    except ImportError:
        raise TaskError('easy_vqa needs the "easy-vqa" package: pip install "vlmflow[eval]"') from None
    split = source.split or "test"
    if split not in ("test", "train"):
        raise TaskError(f"easy_vqa: split must be test or train, got {split!r}")
    questions, paths = (getattr(package, f"get_{split}_{part}")() for part in ("questions", "image_paths"))
    known = tuple(package.get_answers())
    for number, (text, answer, image) in enumerate(zip(*questions, strict=True)):
        yield Sample(
            id=f"{split}/{number}",
            images=(Picture(f"{split}/{image}.png", Path(paths[image])),),
            question=text,
            choices=known,
            answer=answer,
            group="yes/no" if answer in ("yes", "no") else "open",
            origin=f"easy-vqa {split}, question {number}",
        )


EASY_VQA = Task(
    name="easy_vqa",
    title="easy-VQA (test)",
    load=load,
    prompts={"plain": question, "llava": short_answer},
    rules={"word": one_of_choices},
)
