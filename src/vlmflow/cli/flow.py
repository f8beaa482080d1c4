"""``vlmflow flow``: a command for each experiment, with figures and a verdict; ``show``, a picture of one prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from vlmflow.cli.groups import OnceEach, with_groups
from vlmflow.cli.options import (
    MOST,
    JsonOption,
    LauncherOptions,
    LimitOption,
    LoadingOptions,
    ModelOption,
    OutOption,
    SourceOptions,
    check_folder,
    checked_prompt,
    pictures_named,
    task_named,
)
from vlmflow.cli.output import NO_PICTURE, print_json, refusals, remark, say
from vlmflow.cli.progress import do_job
from vlmflow.flow.layers import Layers, named_layers
from vlmflow.flow.table import EXPERIMENTS
from vlmflow.records.files import versions, write_json
from vlmflow.records.schema import FlowRecord, from_json, to_json
from vlmflow.tasks import TASKS, Source, Task

if TYPE_CHECKING:
    from vlmflow.flow.study import Experiment

flow = typer.Typer(
    no_args_is_help=True, help="See where visual information flows: saliency, knock-outs, a picture of one prompt."
)

LayersOption = Annotated[str, typer.Option(help="Layers, as 0-4,8; default: all.")]


@dataclass(frozen=True)
class StudyOptions:
    """Which samples a study looks at."""

    task: Annotated[str | None, typer.Option("--task", "-t", help=f"One of {', '.join(TASKS)}.")] = None
    samples: Annotated[
        Path | None, typer.Option("--samples", help="Instead of a task: a JSON Lines file of image, question, answer.")
    ] = None
    limit: LimitOption = None
    batch_size: Annotated[int, typer.Option(min=1, max=MOST, help="Samples at once, where the study can.")] = 8
    seed: Annotated[int, typer.Option(min=0, max=MOST, help="Of the bootstrap and of random controls.")] = 0

    def subject(self, source: SourceOptions) -> tuple[Task, Source]:
        """The task and where its samples come from.

        Raises:
            ValueError: not one of a task and a file of samples, or an unknown task.
        """
        if (self.task is None) == (self.samples is None):
            raise ValueError("name either a --task or a file of --samples")
        if self.samples is not None and source.path is not None:
            raise ValueError("--source goes with --task; --samples is read as it is")
        return task_named(self.task or "jsonl"), replace(source, path=self.samples or source.path).source()


def study_command(experiment: type[Experiment]) -> Callable[..., None]:
    """The command that runs an experiment on a task's samples; the experiment's fields are options of it."""
    kinds = get_type_hints(experiment)

    def command(
        *,
        out_dir: OutOption,
        settings: Any,
        model: ModelOption = "pico",
        study: StudyOptions,
        source: SourceOptions,
        loading: LoadingOptions,
        launcher: LauncherOptions,
        json_: JsonOption = False,
    ) -> None:
        with refusals():
            task, where = study.subject(source)
            chosen = experiment(
                **{name: _layers(value) if kinds[name] == Layers else value for name, value in vars(settings).items()}
            )
            load = loading.named(model)
            on_ray = launcher.on_ray(load)
            check_folder("--out", out_dir)
            from vlmflow.flow.study import Study

            job = Study(task, chosen, where, study.limit, study.seed)
            samples = job.samples()
        size, title = study.batch_size, f"{experiment.name} {task.name}"
        summary = do_job(lambda attends: job, load, out_dir, on_ray, batch_size=size, samples=samples, title=title)
        say((out_dir / "verdict.md").read_text(encoding="utf-8"))
        for sample, reason in summary["failed"].items():
            remark(f"{sample} failed: {reason}")
        if json_:
            print_json(summary)
        with refusals():
            figures = chosen.figures(from_json(experiment.summary_type, summary, out_dir), out_dir)
        drawn = [f"{stem}.{ending}" for stem in figures for ending in ("png", "svg")]
        say(f"wrote summary.json, verdict.md, {', '.join(drawn)} to {out_dir}")

    command.__annotations__["settings"] = _options_of(experiment, kinds)
    command.__doc__ = (inspect.getdoc(experiment) or "").split("\n")[0]
    return with_groups(command)


def _options_of(experiment: type[Experiment], kinds: Mapping[str, Any]) -> type[Any]:
    """A group of options with an experiment's fields; layers are written as text."""
    options = []
    for entry in fields(experiment):
        name = entry.metadata.get("option", f"--{entry.name.replace('_', '-')}")
        kind, default = (str, "") if kinds[entry.name] == Layers else (kinds[entry.name], entry.default)
        option = Annotated[kind, typer.Option(name, help=entry.metadata["help"])]
        options.append((entry.name, option, field(default=default)))
    return make_dataclass(f"{experiment.__name__}Options", options, frozen=True)


for _experiment in EXPERIMENTS.values():
    flow.command(_experiment.name, cls=OnceEach)(study_command(_experiment))


@flow.command("show", cls=OnceEach)
@with_groups
def show_(
    *,
    image: Annotated[
        list[Path],
        typer.Option("--image", "-i", help="An image file, or sample:0, a bundled one; repeatable."),
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question.")],
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Folder for the picture and a record.")],
    model: ModelOption = "pico",
    layers: LayersOption = "",
    loading: LoadingOptions,
    json_: JsonOption = False,
) -> None:
    """Draw over an image, layer by layer, which patches flow into the instruction and into each other."""
    with refusals():
        check_folder("--out", out_dir)
        named = _layers(layers)
        from vlmflow.models import Question

        question = Question(checked_prompt(prompt), pictures_named(image))
        named_layers(named, len(loading.attends(model)))
        vlm = loading.load(model)
        from vlmflow.figures.maps import flow_maps
        from vlmflow.flow.picture import patches

        drawn = patches(vlm, question, named)
        record = FlowRecord(
            model=model,
            commit=vlm.commit,
            prompt=prompt,
            images=[str(path) for path in image],
            token=drawn.token,
            layers=list(drawn.layers),
            importance={label: importance.double().sum(1).tolist() for label, importance in drawn.flows.items()},
            versions=versions(),
            seen=drawn.seen,
            maps={label: importance.tolist() for label, importance in drawn.flows.items()},
        )
    if json_:
        print_json(to_json(record))
    with refusals():
        write_json(out_dir / "flow.json", to_json(record))
        if drawn.seen.tiles is None:
            remark(NO_PICTURE)
        else:
            title = f"{prompt} → {drawn.token.strip()}\nred: the flow that matters; in percent: the layer's share of it"
            arrays = {label: importance.cpu().numpy() for label, importance in drawn.flows.items()}
            flow_maps(out_dir / "flow", drawn.images, drawn.seen.tiles, drawn.layers, arrays, title)
    say(f"wrote {'flow.png, flow.svg, ' if drawn.seen.tiles is not None else ''}flow.json to {out_dir}")


def _layers(text: str) -> Layers:
    """``0-4,8`` and the like."""
    layers: list[int] = []
    for part in text.split(",") if text.strip() else ():
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"--layers wants numbers and ranges such as 0-4,8, got {text!r:.80}")
        if max(len(first), len(last)) > 4:
            raise ValueError(f"--layers names layers that no model has, got {text!r:.80}")
        layers += range(int(first), int(last or first) + 1)
    return tuple(layers)
