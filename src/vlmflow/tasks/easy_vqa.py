"""easy-VQA, test: 9,673 questions about 1,000 pictures of one coloured shape; all of it in a package, so no download.

Source: easy-VQA 1.0 on PyPI, MIT. Not in the paper: an offline benchmark.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vlmflow.tasks.answers import one_of_choices
from vlmflow.tasks.core import Task, accuracy, right
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
    parts = {
        "test": (package.get_test_questions, package.get_test_image_paths),
        "train": (package.get_train_questions, package.get_train_image_paths),
    }
    split = source.split or "test"
    if split not in parts:
        raise TaskError(f"easy_vqa: split must be test or train, got {split!r}")
    questions, paths = parts[split][0](), parts[split][1]()
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
    score=right,
    measure=accuracy,
    max_new_tokens=16,
    preset="qa",
)
