"""Options and helpers as ``flow.py`` still names them; once its commands take groups, this file goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmflow.cli.options import DeviceOption, LoadingOptions, ModelOption
from vlmflow.cli.output import err_console as notes
from vlmflow.cli.output import refusals

if TYPE_CHECKING:
    from vlmflow.models import VLM

DtypeOption = Annotated[str, typer.Option(help="A torch dtype such as bfloat16, or auto for the checkpoint's own.")]
SourceOption = Annotated[Path | None, typer.Option(help="A local copy of the data in an official format.")]
ImagesOption = Annotated[Path | None, typer.Option(help="The local copy's images, where they do not lie beside it.")]
HubOption = Annotated[str, typer.Option(help="new, old (the data set's two ids), or any other id.")]
ConfigOption = Annotated[str | None, typer.Option(help="The hub data set's configuration.")]
SplitOption = Annotated[str | None, typer.Option(help="Another split than the task's.")]
RevisionOption = Annotated[str | None, typer.Option(help="The hub data set's revision.")]

__all__ = ["DeviceOption", "ModelOption", "absolute", "load_model", "notes", "refusals"]


def absolute(path: Path | None) -> Path | None:
    """A path that means the same wherever a worker runs."""
    return path and path.resolve()


def load_model(name: str, device: str | None, dtype: str) -> VLM:
    """Load a model, or leave with one line."""
    with refusals():
        return LoadingOptions(device, dtype).load(name)
