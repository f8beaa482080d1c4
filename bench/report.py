"""Write the tables and the picture of docs/performance.md from the JSON files beside it; no figure is typed by hand.

    python bench/report.py

The page keeps its text; what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` is written anew.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmflow.evaluate.folder import write_text
from vlmflow.plots import Promise, promises

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
NEVER = "Never run: no result file. `{command}` makes it."


def load(folder: Path, name: str) -> dict[str, Any] | None:
    """A stage's record, None where it was never run; a dry run's is no result."""
    path = folder / f"{name}.json"
    record = json.loads(path.read_text()) if path.exists() else None
    return None if record is None or record["dry"] else record


def ratio(found: dict[str, float]) -> str:
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def source(record: dict[str, Any]) -> str:
    """Where the figures of a table come from."""
    where = ", ".join(
        f"{name} {value}" if name != "device" else str(value) for name, value in record["machine"].items()
    )
    versions = record["versions"]
    return (
        f"`{record['command']}`, {record['geometry']}, {record['dtype']}; {where}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}."
    )


def prefill(record: dict[str, Any]) -> str:
    """First-token times beside what FLOPs and bare layers promise."""
    blocks = [source(record)]
    for point in record["points"]:
        bare = point.get("bare_seconds")
        rows = []
        for name, one in point["methods"].items():
            speedup, promised = one["speedup"]["prefill"], one["promised"]
            cells = [name, seconds(one["seconds"]["prefill"]), ratio(speedup), f"{promised:.2f}"]
            cells.append(f"{speedup['value'] / promised:.1%}")
            if bare:
                cells.append(f"{bare['none'] / bare[name]:.2f}")
            rows.append(cells)
        header = ["method", "prefill", "times as fast", "by exact FLOPs", "reached"] + (["bare layers"] if bare else [])
        blocks.append(f"Batch {point['batch']}, {point['image_tokens'][0]} image tokens:")
        blocks.append(table(header, rows))
        if "keep all" in point["methods"]:
            share = 1 / point["methods"]["keep all"]["speedup"]["prefill"]["value"] - 1
            blocks.append(
                f"The engine, when it drops nothing (hooks, gathers, both rankings): {share:+.1%} of the prefill."
            )
    return "\n\n".join(blocks)


def decode(record: dict[str, Any]) -> str:
    """Times per further token, and the cache that is read for each."""
    rows = []
    for point in record["points"]:
        for name, one in point["methods"].items():
            where = f"{point['batch']} x {point['image_tokens'][0]}"
            share = one["kv_bytes"] / point["methods"]["none"]["kv_bytes"]
            rows.append([where, name, seconds(one["seconds"]["tpot"]), ratio(one["speedup"]["tpot"]), f"{share:.0%}"])
    header = ["batch x image tokens", "method", "a token", "times as fast", "KV bytes"]
    return f"{source(record)}\n\n{table(header, rows)}"


def protocols(record: dict[str, Any]) -> str:
    """A long answer in both protocols."""
    rows = []
    for point in record["points"]:
        for name, one in point["methods"].items():
            rows.append([point["protocol"], name, seconds(one["seconds"]["total"]), ratio(one["speedup"]["total"])])
    deployed, paper = (point["methods"]["none"]["seconds"]["total"] for point in record["points"])
    both = f"Unpruned, the authors' protocol takes {paper / deployed:.1f} times as long as the deployed one."
    return f"{source(record)}\n\n{table(['protocol', 'method', '64 tokens', 'times as fast'], rows)}\n\n{both}"


BLOCKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "cpu-prefill-7b-bfloat16": prefill,
    "cpu-prefill-7b-float32": prefill,
    "cpu-prefill-13b-bfloat16": prefill,
    "cpu-decode": decode,
    "cpu-protocols": protocols,
}


def picture(folder: Path, path: Path) -> None:
    """Theory against measurement: prefill by exact FLOPs, decoding by the bytes that a token reads, the cache."""
    prefills: list[Promise] = []
    decodes: list[Promise] = []
    caches: list[Promise] = []
    for name in BLOCKS:
        record = load(folder, name)
        for point in record["points"] if record else ():
            none = point["methods"]["none"]
            for method, one in point["methods"].items():
                if point["protocol"] != "deployed" or method == "none":
                    continue
                prefills.append(Promise(method, one["promised"], **one["speedup"]["prefill"]))
                if "tpot" in one["speedup"]:
                    weights = record["weight_bytes"]
                    promised = (weights + none["kv_bytes"]) / (weights + one["kv_bytes"])
                    decodes.append(Promise(method, promised, **one["speedup"]["tpot"]))
                measured = none["kv_bytes"] / one["kv_bytes"]
                promised = point["kv_promised"]["none"] / point["kv_promised"][method]
                caches.append(Promise(method, promised, measured, measured, measured))
    panels = {"prefill, times as fast": prefills, "a token, times as fast": decodes, "KV cache, times as small": caches}
    if panels := {label: panel for label, panel in panels.items() if panel}:
        promises(path, panels, "What theory promises, and what was measured")


def filled(page: str, folder: Path) -> str:
    """The page with every block written anew."""
    for name, render in BLOCKS.items():
        machine, _, stage = name.partition("-")
        record = load(folder, name)
        body = render(record) if record else NEVER.format(command=f"python bench/{machine}.py {stage}")
        marks = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(f"{marks[0]}.*?{marks[1]}", re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise SystemExit(f"{PAGE.name} must have one block {marks[0]} ... {marks[1]}")
        page = pattern.sub(lambda _, text=f"{marks[0]}\n{body}\n{marks[1]}": text, page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--folder", type=Path, default=PAGE.with_suffix(""), help="the JSON files")
    options = parser.parse_args()
    picture(options.folder, options.folder / "promises.png")
    write_text(options.page, filled(options.page.read_text(), options.folder))


if __name__ == "__main__":
    main()
