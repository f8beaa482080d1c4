"""``vlmflow flow``: a command for each experiment, with figures and a verdict; ``show``, a picture of one prompt."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from vlmflow.cli.common import DeviceOption, DtypeOption, ModelOption, absolute, load_model, notes, refusals
from vlmflow.cli.evaluate import (
    AddressOption,
    BatchOption,
    ConfigOption,
    EngineOption,
    GpusOption,
    HubOption,
    ImagesOption,
    JsonOption,
    LimitOption,
    OutOption,
    RevisionOption,
    SourceOption,
    SplitOption,
    WorkersOption,
    bars,
    check_out,
    ray_workers,
    show,
    stoppable,
)
from vlmflow.flow.layers import Layers
from vlmflow.flow.table import EXPERIMENTS
from vlmflow.records.files import versions, write_json
from vlmflow.tasks import TASKS, Source, Task

if TYPE_CHECKING:
    from vlmflow.flow.study import Experiment

flow = typer.Typer(
    no_args_is_help=True, help="See where visual information flows: saliency, knock-outs, a picture of one prompt."
)

TaskOption = Annotated[str | None, typer.Option("--task", "-t", help=f"One of {', '.join(TASKS)}.")]
SamplesOption = Annotated[
    Path | None, typer.Option("--samples", help="Instead of a task: a JSON Lines file of image, question, answer.")
]
LayersOption = Annotated[str, typer.Option(help="Layers, as 0-4,8; default: all.")]
SeedOption = Annotated[int, typer.Option(help="Of the bootstrap and of random controls.")]


def study_command(experiment: type[Experiment]) -> Callable[..., None]:
    """The command that runs an experiment on a task's samples; the experiment's fields are options of it."""
    kinds = get_type_hints(experiment)

    def command(
        out_dir: OutOption,
        model: ModelOption = "pico",
        task: TaskOption = None,
        samples: SamplesOption = None,
        source: SourceOption = None,
        images: ImagesOption = None,
        hub: HubOption = None,
        config: ConfigOption = None,
        split: SplitOption = None,
        revision: RevisionOption = None,
        limit: LimitOption = None,
        batch_size: BatchOption = 8,
        seed: SeedOption = 0,
        device: DeviceOption = None,
        dtype: DtypeOption = "auto",
        engine: EngineOption = "local",
        workers: WorkersOption = None,
        gpus_per_worker: GpusOption = None,
        ray_address: AddressOption = None,
        json_: JsonOption = False,
        **fields: Any,
    ) -> None:
        with refusals():
            chosen = _task(task, samples, source)
            where = Source(absolute(samples or source), absolute(images), hub, config, split, revision)
            made = experiment(**{name: _value(kinds[name], value) for name, value in fields.items()})
            on_ray = ray_workers(engine, workers, gpus_per_worker, ray_address)
            check_out(out_dir)
            from vlmflow.evaluate.launch import launch
            from vlmflow.evaluate.on_ray import Loading
            from vlmflow.flow.study import Study

            study = Study(chosen, made, where, limit, seed)
            looked_at = study.samples()
        with refusals(), stoppable(), bars() as progress:
            summary = launch(
                lambda n_layers: study,
                Loading.named(model, device, dtype),
                out_dir,
                on_ray,
                batch_size=batch_size,
                samples=looked_at,
                progress=show(progress, f"{experiment.name} {chosen.name}"),
            )
        if summary is None:
            return  # torchrun's first process has it
        figures = made.figures(summary, out_dir)
        typer.echo((out_dir / "verdict.md").read_text(encoding="utf-8"))
        drawn = [f"{stem}.{ending}" for stem in figures for ending in ("png", "svg")]
        typer.echo(f"wrote summary.json, verdict.md, {', '.join(drawn)} to {out_dir}")
        for sample, reason in summary["failed"].items():
            notes.print(f"{sample} failed: {reason}", highlight=False, markup=False)
        if json_:
            typer.echo(json.dumps(summary))

    common = inspect.signature(command, eval_str=True)
    *shared, _ = common.parameters.values()
    own = [_option(field, kinds[field.name]) for field in dataclasses.fields(experiment)]
    command.__signature__ = common.replace(parameters=[*shared[:1], *own, *shared[1:]])
    command.__doc__ = (inspect.getdoc(experiment) or "").split("\n")[0]
    return command


def _option(field: dataclasses.Field[Any], kind: Any) -> inspect.Parameter:
    """An experiment's field as an option; layers are written as text."""
    name = field.metadata.get("option", f"--{field.name.replace('_', '-')}")
    option = Annotated[str if kind == Layers else kind, typer.Option(name, help=field.metadata["help"])]
    default = "" if kind == Layers else field.default
    return inspect.Parameter(field.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=option)


def _value(kind: Any, given: Any) -> Any:
    """What an option's field holds."""
    return _layers(given) if kind == Layers else given


for _experiment in EXPERIMENTS.values():
    flow.command(_experiment.name)(study_command(_experiment))


@flow.command("show")
def show_(
    image: Annotated[list[Path], typer.Option("--image", "-i", help="An image file; may be repeated.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question.")],
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="Folder for the picture and a record.")],
    model: ModelOption = "pico",
    layers: LayersOption = "",
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Draw over an image, layer by layer, which patches flow into the instruction and into each other."""
    with refusals():
        if not prompt.strip():
            raise ValueError("the prompt is empty; ask something with --prompt")
        check_out(out_dir)
        named = _layers(layers)
        from vlmflow.core.images import open_image
        from vlmflow.models import Question, seen_images

        question = Question(prompt, tuple(open_image(path) for path in image))
    vlm = load_model(model, device, dtype)
    from vlmflow.figures import maps
    from vlmflow.flow.picture import patches

    with refusals():
        found = patches(vlm, question, named)
        flows = {"into the instruction": found.into_instruction, "into each other": found.into_image}
        record = {
            "model": model,
            "prompt": prompt,
            "images": [str(path) for path in image],
            "token": found.token,
            "layers": list(found.layers),
            "importance": {label: own.double().sum(1).tolist() for label, own in flows.items()},
            "versions": versions(),
        }
        seen = seen_images(vlm.encode([question]), question.images)
        title = f"{prompt} → {found.token.strip()}\nred: the flow that matters; in percent: the layer's share of it"
        arrays = {label: flow.cpu().numpy() for label, flow in flows.items()}
        maps.flow_maps(out_dir / "flow", seen, found.grids, found.layers, arrays, title)
        write_json(out_dir / "flow.json", record)
    typer.echo(f"wrote flow.png, flow.svg, flow.json to {out_dir}")
    if json_:
        typer.echo(json.dumps(record))


def _task(name: str | None, samples: Path | None, source: Path | None) -> Task:
    if (name is None) == (samples is None):
        raise ValueError("name either a --task or a file of --samples")
    if samples is not None and source is not None:
        raise ValueError("--source goes with --task; --samples is read as it is")
    if name is not None and name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose from {', '.join(TASKS)}")
    return TASKS[name or "jsonl"]


def _layers(text: str) -> Layers:
    """``0-4,8`` and the like."""
    layers: list[int] = []
    for part in text.split(",") if text.strip() else ():
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"--layers wants numbers and ranges such as 0-4,8, got {text!r}")
        layers += range(int(first), int(last or first) + 1)
    return tuple(layers)
