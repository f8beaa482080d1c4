"""The options that several commands have, each written once: alone, or in groups that know what they stand for.

What is given here and cannot be is refused by a ``ValueError``, before a model is loaded wherever that is possible.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated

import typer

from vlmflow.cli.output import only_json
from vlmflow.evaluate.judge import Judge
from vlmflow.pico import picture_file
from vlmflow.pruners import PRUNERS, Pruner, find_pruners, make_pruner, parse_fields
from vlmflow.tasks import TASKS, Sample, Source, Task, TaskError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmflow.evaluate.evaluation import Evaluation
    from vlmflow.evaluate.on_ray import Loading, Pool
    from vlmflow.models import VLM

MOST = 2**31 - 1  # of whatever is counted, as torch and numpy count
ModelOption = Annotated[str, typer.Option("--model", "-m", help="Hub id, local folder, or pico, the embedded model.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where the model runs, auto to spread it; default: the first accelerator, or cpu.")
]
TaskOption = Annotated[str, typer.Option("--task", "-t", help=f"One of {', '.join(TASKS)}.")]
LimitOption = Annotated[
    int | None, typer.Option(min=1, max=MOST, help="How many samples, from the first on; default: all.")
]
PrunersOption = Annotated[
    str, typer.Option(help="Names with commas between, or classes of your own: file.py:Class, module:Class.")
]
OutOption = Annotated[
    Path, typer.Option("--out", "-o", help="Folder for results; an unfinished run in it is continued.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", callback=only_json, help="Print one line of JSON, and all else on stderr.")
]


@dataclass(frozen=True)
class LoadingOptions:
    """Where and in which precision a model is loaded."""

    device: DeviceOption = None
    dtype: Annotated[str, typer.Option(help="A torch dtype such as bfloat16, or auto for the checkpoint's own.")] = (
        "auto"
    )
    model_revision: Annotated[str | None, typer.Option(help="The model's branch, tag or commit on the hub.")] = None

    def load(self, name: str, attn: str = "sdpa") -> VLM:
        """Load a model (see ``vlmflow.models.load``)."""
        from vlmflow.models import load  # torch and transformers take seconds that --help does not need

        return load(name, self.device, self.dtype, attn, self.model_revision)

    def attends(self, name: str) -> tuple[bool, ...]:
        """Of each of a model's layers, whether it attends; known before its weights are loaded."""
        from vlmflow.models import read_attends

        return read_attends(name, self.model_revision)

    def named(self, name: str) -> Loading:
        """How whoever answers is to load a model (see ``vlmflow.evaluate.launch``)."""
        from vlmflow.evaluate.on_ray import Loading

        return Loading.named(name, self.device, self.dtype, self.model_revision)


@dataclass(frozen=True)
class PrunerOptions:
    """A pruning method and its fields."""

    pruner: Annotated[
        str,
        typer.Option(help=f"One of {', '.join(PRUNERS)}, or a class of your own: path/to/file.py:Class, module:Class."),
    ] = "himap"
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the pruner, as k1=2; may be repeated.")
    ] = None

    def settings(self) -> dict[str, str]:
        """The fields that are set, as text; a ``ValueError`` where the method does not take them all."""
        pairs = [text.partition("=") for text in self.set_ or ()]
        for name, equals, _ in pairs:
            if not equals:
                raise ValueError(f"--set wants field=value, such as k1=2, got {name!r}")
        settings = {name.strip(): value.strip() for name, _, value in pairs}
        if len(settings) < len(pairs):
            raise ValueError("--set names one field twice; leave one of the two")
        parse_fields(self.pruner, settings)
        return settings

    def make(self, attends: Sequence[bool]) -> Pruner:
        """The method for a model of whose layers these attend."""
        return make_pruner(self.pruner, self.settings(), len(attends), attends)


@dataclass(frozen=True)
class SourceOptions:
    """Where a task's samples come from."""

    path: Annotated[Path | None, typer.Option("--source", help="A local copy of the data in an official format.")] = (
        None
    )
    images: Annotated[Path | None, typer.Option(help="The local copy's images, where they do not lie beside it.")] = (
        None
    )
    hub: Annotated[str | None, typer.Option(help="Another hub data set, or folder of one, than the task's.")] = None
    config: Annotated[str | None, typer.Option(help="The hub data set's configuration.")] = None
    split: Annotated[str | None, typer.Option(help="Another split than the task's.")] = None
    revision: Annotated[str | None, typer.Option(help="The hub data set's revision.")] = None

    def source(self) -> Source:
        """The same with absolute paths, which mean the same wherever a worker runs."""
        path, images = self.path and self.path.resolve(), self.images and self.images.resolve()
        return Source(path, images, self.hub, self.config, self.split, self.revision)


@dataclass(frozen=True)
class RunOptions:
    """Which of a task's samples are answered, and how."""

    limit: LimitOption = None
    batch_size: Annotated[int, typer.Option(min=1, max=MOST, help="Samples at once, padded on the left.")] = 8
    prompt_style: Annotated[
        str | None, typer.Option(help="The prompt style; default: paper for its tasks, else plain.")
    ] = None
    rule: Annotated[str | None, typer.Option(help="The answer rule; default: the task's first.")] = None
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="The longest answer, in tokens; default: the task's.")
    ] = None

    def samples(self, task: Task, source: Source) -> list[Sample]:
        """The task's samples; a ``TaskError`` says what is wrong with the source, prompt style or answer rule."""
        samples = task.samples(source, self.limit)
        task.prompt(samples[0], self.prompt_style)
        task.parse("", samples[0], self.rule)
        return samples

    def evaluation(self, task: Task, source: Source, pruner: Pruner, origin: str) -> Evaluation:
        """What is evaluated; ``origin`` says who chose the pruner's fields."""
        from vlmflow.evaluate.evaluation import Evaluation

        return Evaluation(task, pruner, origin, source, self.prompt_style, self.rule, self.limit, self.max_new_tokens)


@dataclass(frozen=True)
class JudgeOptions:
    """Who marks open answers."""

    judge: Annotated[str | None, typer.Option(help="A judge's model name, for open answers.")] = None
    judge_url: Annotated[str | None, typer.Option(help="The judge's endpoint; default: OpenAI's.")] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the judge's requests; send none.")] = False

    def make(self, task: Task, folder: Path) -> Judge | None:
        """The judge, if one is named; its replies are kept in the result folder.

        A ``ValueError`` where the task needs none, or it lacks what it needs to mark.
        """
        if self.judge is None:
            refuse_without("--judge", {"--judge-url": self.judge_url, "--dry-run": self.dry_run or None})
            return None
        task.marked_by()
        judge = Judge(self.judge, folder / "judge", self.judge_url)
        if not self.dry_run:
            judge.check()
        return judge


@dataclass(frozen=True)
class LauncherOptions:
    """Which processes answer."""

    engine: Annotated[str, typer.Option(help="Who answers: local, this process or torchrun's; or ray.")] = "local"
    workers: Annotated[int | None, typer.Option(help="With ray: so many models answer; default: 1.")] = None
    gpus_per_worker: Annotated[
        float | None, typer.Option(help="With ray: GPUs for each; default: one, if there are any.")
    ] = None
    ray_address: Annotated[
        str | None, typer.Option(help="With ray: a cluster's host:port, or auto; default: this machine alone.")
    ] = None

    def on_ray(self, loading: Loading) -> AbstractContextManager[Pool] | None:
        """Ray's workers, to be connected to; None where Ray has no part."""
        if self.engine == "local":
            given = {"--workers": self.workers, "--gpus-per-worker": self.gpus_per_worker}
            refuse_without("--engine ray", {**given, "--ray-address": self.ray_address})
            return None
        if self.engine != "ray":
            raise ValueError(f"--engine must be local or ray, got {self.engine!r}")
        if under_torchrun():
            raise ValueError("--engine ray starts its own workers; run it without torchrun")
        from vlmflow.evaluate.on_ray import connected

        return connected(loading, 1 if self.workers is None else self.workers, self.gpus_per_worker, self.ray_address)


def refuse_without(needed: str, options: Mapping[str, object]) -> None:
    """Refuse options that are given (not None) without what they belong to."""
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"{option} goes with {needed}")


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def task_named(name: str) -> Task:
    """The benchmark of a name, or a ``TaskError``."""
    if name not in TASKS:
        raise TaskError(f"unknown task {name!r}; choose from {', '.join(TASKS)}")
    return TASKS[name]


def pruners_named(text: str) -> list[type[Pruner]]:
    """The methods named with commas between, or a ``ValueError``."""
    return find_pruners(name.strip() for name in text.split(",") if name.strip())


def checked_prompt(text: str) -> str:
    """A question, or a ``ValueError`` where it is empty or no text."""
    if not text.strip():
        raise ValueError("the prompt is empty; ask something with --prompt")
    if any("\ud800" <= character <= "\udfff" for character in text):  # a byte that the terminal could not decode
        raise ValueError("--prompt holds half a character; write it in the terminal's encoding")
    return text


def pictures_named(names: Sequence[Path]) -> tuple[Image, ...]:
    """The pictures in files, or bundled as ``sample:N``; a ``ValueError`` where one cannot be read."""
    from vlmflow.core.images import open_image  # numpy, which --help does not need

    return tuple(open_image(picture_file(name)) for name in names)


def check_folder(option: str, folder: Path) -> None:
    """Refuse before the work a folder, which need not exist yet, that results cannot be written to."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise ValueError(f"{option} wants a folder, and {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{option}: you may not write in {nearest}; choose another folder")
    try:
        with TemporaryFile(dir=nearest) as probe:
            probe.write(b"0" * 4096)
    except OSError as error:  # full, or mounted to be read only
        raise ValueError(f"{option}: cannot write in {nearest} ({error.strerror}); choose another folder") from error


def check_file(option: str, file: Path) -> None:
    """Refuse before the work a file that a result cannot be written to."""
    if file.is_dir():
        raise ValueError(f"{option} wants a file, and {file} is a folder")
    check_folder(option, file.parent)
