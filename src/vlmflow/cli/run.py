"""``vlmflow run`` and ``vlmflow demo``: ask a model about images, under one method or all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import track
from rich.table import Table

from vlmflow.cli.options import (
    MOST,
    DeviceOption,
    JsonOption,
    LoadingOptions,
    ModelOption,
    PrunerOptions,
    check_folder,
    checked_prompt,
    pictures_named,
)
from vlmflow.cli.output import NO_PICTURE, console, err_console, plain_table, print_json, refusals, remark, say
from vlmflow.pruners import PRUNERS, make_pruner
from vlmflow.records.files import versions, write_json
from vlmflow.records.schema import DemoRecord, RunRecord, to_json

if TYPE_CHECKING:
    from torch import Tensor

    from vlmflow.models import Question, Run
    from vlmflow.pico import ScenePicture, SceneQuestion

LEGEND = (
    "Image tokens by stage and in the mean over layers; prefill FLOPs by the paper's Eq. 10 and counted exactly, and "
    "KV cache, as shares of the unpruned run."
)


def run(
    *,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            "-i",
            help="An image file, or sample:0, a bundled one; may be repeated; none: text alone.",
        ),
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question.")],
    model: ModelOption = "pico",
    pruner: PrunerOptions,
    compare: Annotated[bool, typer.Option("--compare", help="Answer under every method, side by side.")] = False,
    save: Annotated[Path | None, typer.Option(help="Folder for a picture of the kept patches and a record.")] = None,
    json_: JsonOption = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="The longest answer, in tokens.")] = 64,
    loading: LoadingOptions,
) -> None:
    """Ask a model about images, with its image tokens pruned."""
    with refusals():
        pruner.settings()  # wrong names, before a model is loaded
        if save is not None:
            check_folder("--save", save)
        from vlmflow.models import Question, seen_by

        images = image or []
        question = Question(checked_prompt(prompt), pictures_named(images))
        if not images:
            remark("no image: the question is asked as text alone, and nothing is pruned")
        attends = loading.attends(model)
        chosen = pruner.make(attends)
        methods = {name: make_pruner(name, {}, len(attends), attends) for name in PRUNERS} if compare else {}
        methods[chosen.name] = chosen
        for method in methods.values():
            method.checked_stages(len(attends), 0)
        vlm = loading.load(model)
        from vlmflow.models.ask import ask

        inputs = vlm.encode([question])
        runs = {name: ask(vlm, [question], method, max_new_tokens, inputs)[0] for name, method in methods.items()}
    print_runs(runs)
    record = RunRecord(
        model=model,
        commit=vlm.commit,
        prompt=prompt,
        images=[str(path) for path in images],
        versions=versions(),
        runs={name: run.record() for name, run in runs.items()},
        seen=seen_by(vlm, question, inputs, next(iter(runs.values())).positions),
    )
    if json_:
        print_json(to_json(record))
    if save is not None:
        with refusals():
            save_run(save, question, inputs, runs, record)


def print_runs(runs: dict[str, Run]) -> None:
    """The answers, and what they cost."""
    table = cost_table("answer")
    for name, answered in runs.items():
        table.add_row(name, answered.answer.text, *cost_cells(answered))
    console.print(table)
    console.print(LEGEND)


def cost_table(*columns: str) -> Table:
    """A table whose last columns are what pruning saves; ``LEGEND`` says what they mean."""
    table = plain_table("method", *columns, "image tokens", "mean", "Eq. 10", "FLOPs", "KV")
    for column in table.columns:
        column.no_wrap = column.header not in ("method", "answer")
    return table


def cost_cells(run: Run) -> list[str]:
    """The cells for ``cost_table``'s last columns; shares are of the unpruned prefill."""
    table = run.cost.table()
    shares = [f"{table[measure][2]:.0%}" for measure in ("paper_flops", "exact_flops", "kv_bytes")]
    return [run.steps, f"{table['mean_image_tokens'][1]:.0f}", *shares]


def save_run(
    folder: Path, question: Question, inputs: dict[str, Tensor], runs: Mapping[str, Run], record: RunRecord | DemoRecord
) -> None:
    """Write ``record.json`` and, where it is known how the image tokens lie, ``patches.png``."""
    from vlmflow.figures import maps
    from vlmflow.models import seen_images

    write_json(folder / "record.json", to_json(record))
    say(f"wrote {folder / 'record.json'}")
    if record.seen is None or record.seen.tiles is None:
        remark(NO_PICTURE)
        return
    methods = {f"{name}: {run.answer.text[:40]}": run.stages for name, run in runs.items()}
    images = seen_images(inputs, question.images)
    maps.kept_patches(folder / "patches.png", images, record.seen.tiles, methods, question.text)
    say(f"wrote {folder / 'patches.png'}")


def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path("demo"),
    limit: Annotated[int, typer.Option(min=1, max=MOST, help="How many of the bundled pictures.")] = 10,
    device: DeviceOption = None,
) -> None:
    """Ask the embedded model about its sample pictures under every method: answers, tokens, cost, time."""
    from vlmflow.core.images import open_image
    from vlmflow.models import Question, load, seen_by
    from vlmflow.models.ask import ask
    from vlmflow.pico import samples
    from vlmflow.speed.latency import Request, compare

    with refusals():
        check_folder("--out", out_dir)
        vlm = load("pico", device)
    methods = {name: make_pruner(name, {}, vlm.n_layers, vlm.attends) for name in PRUNERS}
    right = dict.fromkeys(methods, 0)
    shown: dict[str, Run] = {}
    pictures = [(sample, two_questions(sample, number)) for number, sample in enumerate(samples()[:limit])]
    steps = [(sample, questions, name) for sample, questions in pictures for name in methods]
    for sample, questions, name in track(steps, "Asking", console=err_console, transient=True):
        image = open_image(sample.image)
        runs = ask(vlm, [Question(q.text, (image,)) for q in questions], methods[name], max_new_tokens=16)
        right[name] += sum(run.answer.text in q.answers for run, q in zip(runs, questions, strict=True))
        shown.setdefault(name, runs[0])
    sample, (question, _) = pictures[0]
    total = 2 * len(pictures)
    first = Question(question.text, (open_image(sample.image),))
    inputs = vlm.encode([first])
    measured = compare(vlm.model, Request(inputs), methods, repeats=5).methods
    table = cost_table("answer", "right")
    table.add_column("time")
    for name, run in shown.items():
        mark = "✓" if run.answer.text in question.answers else "✗"
        ratio = f"{measured[name].seconds['prefill'] / measured['none'].seconds['prefill']:.0%}"
        table.add_row(name, f"{run.answer.text} {mark}", str(right[name]), *cost_cells(run), ratio)
    console.print(f"“{question.text}” ({sample.image.name}), and how many of {total} questions were answered right:")
    console.print(table)
    console.print(f"{LEGEND} Time: of the prefill, measured, likewise.")
    record = DemoRecord(
        versions=versions(),
        asked=total,
        right=right,
        runs={name: run.record() for name, run in shown.items()},
        seen=seen_by(vlm, first, inputs, shown["none"].positions),
    )
    with refusals():
        save_run(out_dir, first, inputs, {name: run for name, run in shown.items() if name != "none"}, record)


def two_questions(sample: ScenePicture, number: int) -> list[SceneQuestion]:
    """Two of a picture's questions, of other kinds for other pictures; no captions: they are not right or wrong."""
    questions = [question for question in sample.questions if question.kind != "caption"]
    return [questions[(i + 2 * number) % len(questions)] for i in (5, 6)]
