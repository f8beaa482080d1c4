"""``vlmflow bench``: time and memory of methods, measured side by side."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.progress import Progress

from vlmflow.cli.options import (
    MOST,
    JsonOption,
    LoadingOptions,
    ModelOption,
    PrunersOption,
    check_file,
    pruners_named,
    refuse_without,
    task_named,
)
from vlmflow.cli.output import console, err_console, plain_table, print_json, refusals, say
from vlmflow.core.geometry import GEOMETRIES, geometry_named
from vlmflow.pruners import PUBLISHED, Unpruned
from vlmflow.records.files import versions, write_json
from vlmflow.records.schema import BenchPoint, BenchRecord, to_json
from vlmflow.tasks import TASKS, Source

if TYPE_CHECKING:
    from vlmflow.core.statistics import Interval
    from vlmflow.models import Question
    from vlmflow.speed.latency import Protocol

PROTOCOLS: dict[Protocol, str] = {
    "deployed": "KV cache, fused attention",
    "paper": "no cache, eager attention, all attention matrices returned",
}

METHODS = ",".join(method.name for method in PUBLISHED)
LEGEND = (
    "Times as fast as none, to the first token (vision included) and end to end, with 95 % intervals over the rounds; "
    "FLOPs: what the decoder's prefill would gain if time were FLOPs; memory: the peak above what was held before."
)
SHARED = " (random weights at true widths; all layers share one set: same arithmetic, a fraction of the memory)"


@dataclass(frozen=True)
class SubjectOptions:
    """What is timed: a model, or random weights at a known model's widths."""

    model: ModelOption = "pico"
    geometry: Annotated[
        str | None,
        typer.Option(help=f"Instead of a model: random weights at the widths of one of {', '.join(GEOMETRIES)}."),
    ] = None
    layers: Annotated[int | None, typer.Option(min=3, max=1000, help="Another number of layers.")] = None


@dataclass(frozen=True)
class PromptOptions:
    """What is asked: a model gets a task's first questions, random weights get random tokens."""

    task: Annotated[str, typer.Option("--task", "-t", help=f"A model's questions: one of {', '.join(TASKS)}.")] = "pico"
    source: Annotated[Path | None, typer.Option(help="A local copy of the task's data in an official format.")] = None
    batch_size: Annotated[str, typer.Option(help="One or more, with commas between.")] = "1"
    new_tokens: Annotated[str, typer.Option(help="Length of the answer; one or more, with commas between.")] = "16"
    image_tokens: Annotated[str, typer.Option(help="Of a geometry's prompt; one or more, with commas.")] = "576"
    text_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="Of a geometry's prompt, all after the images.")] = (
        60
    )


def bench(
    *,
    subject: SubjectOptions,
    pruners: PrunersOption = METHODS,
    prompts: PromptOptions,
    protocol: Annotated[
        str, typer.Option(help="; ".join(f"{name}: {what}" for name, what in PROTOCOLS.items()) + ".")
    ] = "deployed",
    repeats: Annotated[int, typer.Option(min=1, max=MOST, help="Interleaved rounds, after one that warms up.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, max=MOST, help="Processor threads; default: torch's.")] = None,
    save: Annotated[Path | None, typer.Option(help="A JSON file for the record.")] = None,
    json_: JsonOption = False,
    loading: LoadingOptions,
) -> None:
    """Measure first-token time, time per further token and memory of methods beside the unpruned model."""
    import torch

    from vlmflow.speed.latency import Request, compare, machine
    from vlmflow.speed.synthetic import CONTEXT, random_prompt

    with refusals():
        if protocol not in PROTOCOLS:
            raise ValueError(f"unknown protocol {protocol!r}; choose from {', '.join(PROTOCOLS)}")
        chosen = [method for method in pruners_named(pruners) if method is not Unpruned]  # which always runs
        batches = whole_numbers("--batch-size", prompts.batch_size)
        lengths = whole_numbers("--new-tokens", prompts.new_tokens)
        images = whole_numbers("--image-tokens", prompts.image_tokens)
        if save is not None:
            check_file("--save", save)
        if threads:
            torch.set_num_threads(threads)
        attn = "sdpa" if protocol == "deployed" else "eager"
        questions: list[Question] = []
        asked: dict[str, str] = {}
        if subject.geometry is None:
            refuse_without("--geometry", {"--layers": subject.layers})
            questions, asked = first_questions(prompts.task, prompts.source, max(batches))
            depth = len(loading.attends(subject.model))
        else:
            depth = subject.layers or geometry_named(subject.geometry).layers
            if (longest := max(images) + prompts.text_tokens) > CONTEXT:
                raise ValueError(f"the prompt has {longest} tokens, and random weights {CONTEXT} positions; ask less")
        methods = {method.name: method.scaled(depth) for method in chosen}
        for method in methods.values():
            method.checked_stages(depth, 0)
        if subject.geometry is None:
            vlm = loading.load(subject.model, attn)
            model, inputs = vlm.model, [vlm.encode(questions[:batch]) for batch in batches]
        else:
            model = random_weights(subject.geometry, subject.layers, images, loading, attn)
            sizes = product(images, batches)
            inputs = [random_prompt(model, length, prompts.text_tokens, batch) for length, batch in sizes]
    requests = [Request(prompt, length, protocol) for prompt, length in product(inputs, lengths)]
    name = subject.geometry or subject.model
    console.print(f"{name}{SHARED if subject.geometry else ''}; protocol {protocol}: {PROTOCOLS[protocol]}.")
    points: list[BenchPoint] = []
    with Progress(console=err_console, transient=True) as progress:
        bar = progress.add_task("Measuring", total=len(requests) * (repeats + 1) * (len(methods) + 1))
        for request in requests:
            points.append(compare(model, request, methods, repeats, each=lambda _: progress.advance(bar)))
            print_point(points[-1])
    console.print(LEGEND)
    measured = BenchRecord(
        subject=name,
        layers=depth,
        shared_weights=subject.geometry is not None,
        protocol=protocol,
        dtype=str(model.dtype).removeprefix("torch."),
        repeats=repeats,
        machine=machine(model.device),
        versions=versions(),
        points=points,
        commit=getattr(model.config, "_commit_hash", None),
        questions=asked,
    )
    record = to_json(measured)
    if json_:
        print_json(record)  # first: what took long to measure is not lost with a place that is full
    if save is not None:
        with refusals():
            write_json(save, record)
        say(f"wrote {save}")


def first_questions(task: str, source: Path | None, count: int) -> tuple[list[Question], dict[str, str]]:
    """A task's first questions, so many, and where they came from.

    Raises:
        TaskError: no such task, or what is wrong with the source.
        ValueError: it has fewer.
    """
    from vlmflow.models import Question

    chosen = task_named(task)
    where = Source(source and source.resolve())
    samples = chosen.samples(where, count)
    if len(samples) < count:
        raise ValueError(f"{task} has {len(samples)} samples, too few for --batch-size {count}")
    questions = [Question(chosen.prompt(s, None), tuple(picture.open() for picture in s.images)) for s in samples]
    return questions, {"task": task, **chosen.describe(where, samples)}


def random_weights(geometry: str, layers: int | None, images: list[int], loading: LoadingOptions, attn: str) -> Any:
    """A random model of a geometry's widths, for prompts with such numbers of image tokens."""
    from vlmflow.models import device_named, dtype_named
    from vlmflow.speed.synthetic import random_model, square_side

    return random_model(
        geometry_named(geometry),
        square_side(*images),
        layers=layers,
        share_weights=True,
        dtype=dtype_named("bfloat16" if loading.dtype == "auto" else loading.dtype),
        device=device_named(loading.device),
        attn=attn,
    )


def whole_numbers(option: str, text: str) -> list[int]:
    """Whole numbers with commas between.

    Raises:
        ValueError: something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 7 and int(part) for part in parts):
        raise ValueError(
            f"{option} wants whole numbers above 0 and below a million, with commas between, such as 1,8, "
            f"got {text!r:.80}"
        )
    return [int(part) for part in parts]


def print_point(point: BenchPoint) -> None:
    """One setting's table, and the methods that do not pay there."""
    images, texts = (sum(tokens) / point.batch for tokens in (point.image_tokens, point.text_tokens))
    console.print(f"\nBatch {point.batch}, {images:g} image and {texts:g} text tokens, {point.new_tokens} new tokens")
    columns = ("method", "vision\n+ prefill", "times\nas fast", "FLOPs", "next", "end\nto end", "memory")
    table = plain_table(*columns)
    for column in table.columns:
        column.justify, column.no_wrap = "left" if column.header == "method" else "right", True
    for name, latency in point.methods.items():
        table.add_row(
            name,
            f"{seconds(latency.seconds['vision'])}\n+ {seconds(latency.seconds['prefill'])}",
            ratio(latency.speedup["ttft"], "\n"),
            f"{latency.promised:.2f}" if latency.promised else "?",
            seconds(latency.seconds["tpot"]) if "tpot" in latency.seconds else "",
            ratio(latency.speedup["total"], "\n"),
            decimal(latency.peak_bytes) if latency.peak_bytes is not None else "?",
        )
    console.print(table)
    for name, total in point.not_paying.items():
        console.print(f"{name}: no sure gain here, {ratio(total)} times as fast end to end.")


def seconds(value: float) -> str:
    """A time."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms" if value >= 0.1 else f"{value * 1e3:.1f} ms"


def ratio(interval: Interval, between: str = " ") -> str:
    """A speed-up with its interval."""
    return f"{interval.value:.2f}{between}({interval.low:.2f}-{interval.high:.2f})"
