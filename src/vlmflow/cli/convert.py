"""``vlmflow convert``: Qwen-VL-Chat as safetensors, for other tools; vlmflow itself reads it as it was published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmflow.cli.options import check_folder
from vlmflow.cli.output import refusals, say


def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or local folder of Qwen-VL or Qwen-VL-Chat.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where it goes; as large as the model.")],
    *,
    model_revision: Annotated[str | None, typer.Option(help="The model's branch, tag or commit on the hub.")] = None,
) -> None:
    """Write Qwen-VL's pickled weights as safetensors, with a tokenizer and chat template that need no code of its own.

    vlmflow needs none of this. The weights stay under the Tongyi Qianwen licence, which asks for a copy of itself.
    """
    with refusals():
        check_folder("FOLDER", folder)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty; choose another folder")
        from vlmflow.models import convert as write

        shards = write(model, folder, model_revision)
    say(f"wrote {shards} shards with tokenizer and settings to {folder}")
