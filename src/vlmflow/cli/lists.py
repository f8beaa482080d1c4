"""``vlmflow pruners`` and ``vlmflow models``: what there is."""

from __future__ import annotations

import inspect

from vlmflow.cli.output import console, plain_table, remark
from vlmflow.core.families import PRICED
from vlmflow.pruners import PRUNERS
from vlmflow.pruners.outside import code_of, installed_pruners, load_installed


def pruners() -> None:
    """List the pruning methods: their fields with defaults, what they do, where they come from.

    Those that installed packages offer come last.
    """
    methods = list(PRUNERS.values())
    for name in installed_pruners():
        try:
            methods.append(load_installed(name))
        except ValueError as error:
            remark(f"left out: {error}")
    table = plain_table("name", "fields and defaults", "what it does", "source")
    for method in methods:
        lines = (inspect.getdoc(method) or "").split("\n")
        sources = [line.removeprefix("Source: ").rstrip(".") for line in lines if line.startswith("Source: ")]
        source = sources[0] if sources else code_of(method) or "a control"
        defaults = ", ".join(f"{field}={value}" for field, value in vars(method()).items()) or "none"
        table.add_row(method.name, defaults, lines[0].replace("``", ""), source)
    console.print(table)
    console.print("Layers scale with the model's depth unless they are set.")


def models() -> None:
    """List the model families that work."""
    table = plain_table("model_type", "known as")
    table.add_row("pico", "the embedded model (a LLaVA of 5 million weights)")
    for family in PRICED.values():
        table.add_row(family.model_type, family.known_as)
    console.print(table)
