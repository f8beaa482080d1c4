"""``vlmflow pruners`` and ``vlmflow models``: what there is."""

from __future__ import annotations

import inspect
from dataclasses import fields

from vlmflow.cli.common import out, plain_table
from vlmflow.pruners import PRUNERS


def pruners() -> None:
    """List the pruning methods: their fields with defaults, what they do, where they come from."""
    table = plain_table("name", "fields and defaults", "what it does", "source")
    for name, cls in PRUNERS.items():
        lines = (inspect.getdoc(cls) or "").split("\n")
        source = next((line.removeprefix("Source: ") for line in lines if line.startswith("Source: ")), "a control")
        defaults = ", ".join(f"{field.name}={field.default}" for field in fields(cls)) or "none"
        table.add_row(name, defaults, lines[0].replace("``", ""), source.rstrip("."))
    out.print(table)
    out.print("Layers scale with the model's depth unless they are set.")


def models() -> None:
    """List the model families that work."""
    from vlmflow.models import FAMILIES

    table = plain_table("model_type", "known as")
    table.add_row("pico", "the embedded model (a LLaVA of 5 million weights)")
    for model_type, known_as in FAMILIES.items():
        table.add_row(model_type, known_as)
    out.print(table)
