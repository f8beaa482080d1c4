"""``vlmflow samples``: the bundled pictures as files of one's own, with questions about them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from vlmflow.cli.options import check_folder
from vlmflow.cli.output import refusals, say
from vlmflow.records.files import replacing, write_text

QUESTIONS = "questions.jsonl"


def samples(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where they go.")]) -> None:
    """Copy the bundled pictures and a file of questions about them into a folder.

    ``eval --task jsonl --source`` and ``flow --samples`` read the questions.
    """
    from vlmflow import pico

    scenes = pico.samples()
    with refusals():
        check_folder("DIR", folder)
        for name in (QUESTIONS, *(scene.image.name for scene in scenes)):
            if (folder / name).exists():
                raise ValueError(f"{folder / name} is there already; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        for scene in scenes:
            with replacing(folder / scene.image.name) as partial:
                shutil.copyfile(scene.image, partial)
        lines = [
            {
                "id": f"{scene.image.stem}/{question.kind}",
                "image": scene.image.name,
                "question": question.text,
                "answer": question.answer,
                "group": question.kind,
            }
            for scene in scenes
            for question in scene.questions
            if question.kind != "caption"  # no caption is the right one
        ]
        write_text(folder / QUESTIONS, "".join(json.dumps(line) + "\n" for line in lines))
    say(f"wrote {len(scenes)} pictures and {QUESTIONS} with {len(lines)} questions to {folder}")
