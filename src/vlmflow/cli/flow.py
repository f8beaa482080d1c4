"""``vlmflow flow saliency``, ``knockout`` and ``show``: the paper's analysis, with figures and a verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmflow.cli.common import DeviceOption, DtypeOption, ModelOption, absolute, load_model, notes, refusals
from vlmflow.cli.evaluate import (
    ConfigOption,
    HubOption,
    ImagesOption,
    JsonOption,
    LimitOption,
    OutOption,
    RevisionOption,
    SourceOption,
    SplitOption,
    bars,
    show,
    stoppable,
)
from vlmflow.records.files import versions, write_json
from vlmflow.tasks import TASKS, Source, Task

if TYPE_CHECKING:
    from vlmflow.flow.study import Experiment

INTERVALS = ", 95 % intervals"

flow = typer.Typer(
    no_args_is_help=True, help="See where visual information flows: saliency, knock-outs, a picture of one prompt."
)

TaskOption = Annotated[str | None, typer.Option("--task", "-t", help=f"One of {', '.join(TASKS)}.")]
SamplesOption = Annotated[
    Path | None, typer.Option("--samples", help="Instead of a task: a JSON Lines file of image, question, answer.")
]
LayersOption = Annotated[str, typer.Option(help="Layers, as 0-4,8; default: all.")]
SeedOption = Annotated[int, typer.Option(help="Of the bootstrap and of random controls.")]


@flow.command()
def saliency(
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
    layers: LayersOption = "",
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    json_: JsonOption = False,
) -> None:
    """What system, image and instruction tokens contribute, layer by layer (Eq. 1 to 6, Figures 2, 3 and 9)."""
    with refusals():
        chosen = _task(task, samples, source)
        where = Source(absolute(samples or source), absolute(images), hub, config, split, revision)
        named = _layers(layers)
        from vlmflow.flow.contributions import ByLayer

    summary = _study(chosen, where, limit, seed, ByLayer(named), out_dir, model, device, dtype)
    from vlmflow.figures import analysis

    measures, title, where = summary["measures"], _title(summary), summary["settings"]["examined"]
    importance = "importance (mean over samples)"
    contributions = {
        "system tokens (S_sys)": "s_sys",
        "image tokens (S_img)": "s_img",
        "instruction tokens (S_ins)": "s_ins",
    }
    flows = {"visual-textual (S_vt)": "s_vt", "intra-visual (S_vv)": "s_vv"}
    for stem, names in {"contributions": contributions, "flows": flows}.items():
        curves = {label: _curve(measures[name]) for label, name in names.items()}
        analysis.by_layer(out_dir / stem, where, curves, importance, title)
    analysis.lengths(out_dir / "lengths", summary["lengths"], title.removesuffix(INTERVALS))
    _close(summary, out_dir, ["contributions", "flows", "lengths"], json_)


@flow.command()
def knockout(
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
    layers: LayersOption = "",
    windows: Annotated[int, typer.Option(help="How many layers are blocked together: 1, 2 or 5.")] = 2,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    json_: JsonOption = False,
) -> None:
    """What the prediction loses when a flow is blocked in some layers (Eq. 7, Figures 4 and 5)."""
    with refusals():
        chosen = _task(task, samples, source)
        where = Source(absolute(samples or source), absolute(images), hub, config, split, revision)
        named = _layers(layers)
        from vlmflow.flow.windows import ByWindow

        experiment = ByWindow(named, windows)
    summary = _study(chosen, where, limit, seed, experiment, out_dir, model, device, dtype)
    from vlmflow.figures import analysis

    title, kept = _title(summary), summary["consistency"]
    panels = {
        f"{measure} consistency": {f"{path} flow": _curve(own) for path, own in kept[measure].items()}
        for measure in ("label", "score")
    }
    first, last = (len(end) for end in summary["settings"]["ends"])
    analysis.consistencies(out_dir / "consistency", [f"first {first} layers", f"last {last} layers"], panels, title)
    lost = {f"{path} flow": _curve(own) for path, own in summary["lost"]["score"].items()}
    places = ["-".join(map(str, dict.fromkeys((own[0], own[-1])))) for own in summary["settings"]["examined"]]
    analysis.log_ratios(out_dir / "windows", places, lost, _curve(summary["log_vv_vt"]["score"]), title)
    _close(summary, out_dir, ["consistency", "windows"], json_)


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
        if out_dir.is_file():
            raise ValueError(f"--out wants a folder, and {out_dir} is a file")
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


def _study(
    task: Task,
    source: Source,
    limit: int | None,
    seed: int,
    experiment: Experiment,
    out_dir: Path,
    model: str,
    device: str | None,
    dtype: str,
) -> dict[str, Any]:
    """Run an experiment; its summary. Bad samples and settings are refused before a model is loaded."""
    from vlmflow.flow.study import Study, run

    study = Study(task, experiment, source, limit, seed)
    with refusals():
        if out_dir.is_file():
            raise ValueError(f"--out wants a folder, and {out_dir} is a file")
        samples = study.samples()
    vlm = load_model(model, device, dtype)
    with refusals(), stoppable(), bars() as progress:
        return run(vlm, study, out_dir, samples, show(progress, f"{experiment.name} {task.name}"))


def _close(summary: Mapping[str, Any], out_dir: Path, figures: Sequence[str], json_: bool) -> None:
    """Print the verdict and what was written."""
    typer.echo((out_dir / "verdict.md").read_text(encoding="utf-8"))
    typer.echo(
        f"wrote summary.json, verdict.md, {', '.join(f'{name}.png, {name}.svg' for name in figures)} to {out_dir}"
    )
    for sample, reason in summary["failed"].items():
        notes.print(f"{sample} failed: {reason}", highlight=False, markup=False)
    if json_:
        typer.echo(json.dumps(summary))


def _task(name: str | None, samples: Path | None, source: Path | None) -> Task:
    if (name is None) == (samples is None):
        raise ValueError("name either a --task or a file of --samples")
    if samples is not None and source is not None:
        raise ValueError("--source goes with --task; --samples is read as it is")
    if name is not None and name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose from {', '.join(TASKS)}")
    return TASKS[name or "jsonl"]


def _layers(text: str) -> tuple[int, ...]:
    """``0-4,8`` and the like."""
    layers: list[int] = []
    for part in text.split(",") if text.strip() else ():
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"--layers wants numbers and ranges such as 0-4,8, got {text!r}")
        layers += range(int(first), int(last or first) + 1)
    return tuple(layers)


def _title(summary: Mapping[str, Any]) -> str:
    settings, counts = summary["settings"], summary["samples"]
    return f"{settings['model']} on {settings['task']}, {counts['kept']} samples{INTERVALS}"


def _curve(intervals: Sequence[Mapping[str, Any]]) -> Any:
    """Recorded intervals, for drawing."""
    from vlmflow.figures.analysis import Curve
    from vlmflow.flow.verdict import number

    return Curve(*([number(own[name]) for own in intervals] for name in ("value", "low", "high")))
