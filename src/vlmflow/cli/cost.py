"""``vlmflow cost``: what a method costs on paper, from a model's widths alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Annotated

import typer
from rich.filesize import decimal

from vlmflow.cli.options import MOST, JsonOption, PrunerOptions
from vlmflow.cli.output import console, plain_table, print_json, refusals
from vlmflow.core.cost import projector_flops, vision_flops
from vlmflow.core.geometry import GEOMETRIES, Geometry
from vlmflow.evaluate.published import paper_tables
from vlmflow.records.schema import CostRecord, PriceRecord, to_json

NAMES = {
    "mean_image_tokens": "image tokens entering a layer, mean",
    "paper_flops": "prefill, Eq. 10 (image tokens only)",
    "exact_flops": "prefill, exact",
    "decode_flops": "a decoded token, exact",
    "kv_bytes": "KV cache after the prefill, 16-bit",
}


def cost(
    *,
    model: Annotated[
        str, typer.Option("--model", "-m", help=f"Hub id, local folder, pico, or one of {', '.join(GEOMETRIES)}.")
    ] = "llava-1.5-7b",
    model_revision: Annotated[str | None, typer.Option(help="The model's branch, tag or commit on the hub.")] = None,
    pruner: PrunerOptions,
    image_tokens: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Default: those of one tile (LLaVA-1.5: of the image).")
    ] = None,
    text_tokens: Annotated[
        int, typer.Option(min=1, max=MOST, help="Text tokens of the prompt, all after the image.")
    ] = 60,
    paper: Annotated[bool, typer.Option("--paper", help="Recompute the costs in the HiMAP paper's tables.")] = False,
    json_: JsonOption = False,
) -> None:
    """Count FLOPs and KV bytes of a method on a model, from its config; no weights needed."""
    if paper:
        print_paper(json_)
        return
    with refusals():
        geometry, commit = (GEOMETRIES[model], None) if model in GEOMETRIES else read_geometry(model, model_revision)
        chosen = pruner.make([kind.attends for kind in geometry.kinds])
        n_image = image_tokens or (geometry.vision and geometry.vision.image_tokens)
        if n_image is None:
            raise ValueError(f"how many image tokens {model} makes depends on the image; say it with --image-tokens")
        schedule = chosen.schedule(geometry.layers, n_image)
        priced = chosen.cost(geometry, n_image, text_tokens, text_tokens)
    table = plain_table("", "unpruned", chosen.name, "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for measure, (whole, part, share) in priced.table().items():
        table.add_row(NAMES[measure], shown(measure, whole), shown(measure, part), f"{share:.1%}")
    console.print(f"{model}: {geometry.layers} layers, {n_image} image and {text_tokens} text tokens")
    console.print(table)
    console.print(f"{chosen}: image tokens entering layers {spans(schedule)}.")
    ranking = flops(priced.pruned.score_flops)
    console.print(f"Exact counts all pairs of tokens, the output head and the ranking ({ranking}).")
    tower, projector = tiled_vision(geometry, n_image)
    if tower is not None and projector is not None:
        beside = tower + projector
        share = beside / (beside + priced.unpruned.exact_flops)
        shares = f"{share:.0%} of the unpruned whole"
        console.print(f"Vision tower {flops(tower)}, projector {flops(projector)}, under every method: {shares}.")
    if json_:
        record = PriceRecord(
            model=model,
            pruner=chosen.to_dict(),
            image_tokens=n_image,
            text_tokens=text_tokens,
            schedule=list(schedule),
            cost=CostRecord.of(priced),
            vision_flops=tower,
            projector_flops=projector,
            commit=commit,
        )
        print_json(to_json(record))


def read_geometry(model: str, revision: str | None) -> tuple[Geometry, str | None]:
    """The widths in a model's config, and the hub's commit of it."""
    # torch and transformers take seconds that built-in widths do not need
    from vlmflow.models import config_commit, load_geometry

    return load_geometry(model, revision), config_commit(model, revision)


def tiled_vision(geometry: Geometry, n_image: int) -> tuple[int, int] | tuple[None, None]:
    """FLOPs of the vision tower and the projector, None unless the image tokens are whole tiles of a known size."""
    tower = geometry.vision
    if tower is None or tower.grid is None or tower.image_tokens is None or n_image % tower.image_tokens:
        return None, None
    tiles = [tower.grid] * (n_image // tower.image_tokens)
    return vision_flops(tower, tiles), projector_flops(tower, tiles)


def shown(measure: str, value: float) -> str:
    """A figure with its unit."""
    if measure == "mean_image_tokens":
        return f"{value:.1f}"
    return decimal(int(value)) if measure == "kv_bytes" else flops(value)


def flops(value: float) -> str:
    """A count of operations."""
    return f"{value / 1e9:,.3f} GFLOP"


def spans(schedule: Sequence[int]) -> str:
    """``0-1: 576, 2-7: 288, ...``: how many image tokens enter which layers."""
    parts = []
    for count, group in groupby(enumerate(schedule), key=lambda pair: pair[1]):
        layers = [layer for layer, _ in group]
        parts.append(f"{layers[0]}-{layers[-1]}: {count}")
    return ", ".join(parts)


def print_paper(json_: bool) -> None:
    """The paper's Tables 1 and 2 beside what Eq. 10 gives, with what would print the cells that differ."""
    rows = paper_tables()
    notes = list(dict.fromkeys(row.note for row in rows if row.note))
    for number, group in groupby(rows, key=lambda row: row.table):
        table = plain_table("model", "method", "setting", "TFLOPs", "Eq. 10", "ratio", "Eq. 10")
        for column in table.columns:
            column.no_wrap = True
        for row in group:
            figures = [row.printed_tflops, f"{row.tflops:.3f}", row.printed_ratio, f"{row.ratio:.1%}"]
            note = f" ({notes.index(row.note) + 1})" if row.note else ""
            table.add_row(row.model, row.method + note, row.setting.replace(" = ", "="), *figures)
        console.print(f"Table {number} of the paper, as printed and by Eq. 10 with the stated settings:")
        console.print(table)
    console.print("What would print the cells that the stated settings do not:")
    for number, note in enumerate(notes, start=1):
        console.print(f"({number}) {note}")
    if json_:
        print_json([asdict(row) for row in rows])
