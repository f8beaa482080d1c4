"""Write the tables and the picture of docs/performance.md from what ``bench`` measured; no figure is typed by hand.

    python -m docs.make.performance

The page keeps its text; what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` is written anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docs.make.page import ROOT, put, table
from vlmflow.core.statistics import Interval
from vlmflow.figures.comparison import Promise, promises
from vlmflow.records.files import write_text

PAGE = ROOT / "docs" / "performance.md"
NEVER = "Never run: no result file. `{command}` makes it."
RESTATED = (
    "Restated for bfloat16 are laws 1 (keep everything), 2 (knock-out), 3 (cached step), 4 (batch) and 8 (cache "
    "lengths). Not law 5, the kept set, where rounding may tip a rank, and not laws 6 and 7, FLOPs and what is left "
    "behind, which no number format touches."
)
DROP_NOTHING = ("none", "keep all")
TARGETED = "llava-1.5-7b"
REACHED, ADDED = 0.9, 0.03  # at least, of what FLOPs promise; at most, to the time of an unpruned prefill


def load(folder: Path, name: str) -> dict[str, Any] | None:
    """A stage's record, None where it was never run; a dry run's is no result."""
    path = folder / f"{name}.json"
    record = json.loads(path.read_text()) if path.exists() else None
    return None if record is None or record["dry"] else record


def ratio(interval: dict[str, float]) -> str:
    return f"{interval['value']:.2f} ({interval['low']:.2f} to {interval['high']:.2f})"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def gigabytes(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e9:.2f} GB"


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
    """First-token times beside what FLOPs and, where they ran, bare layers promise."""
    (point,) = record["points"]
    bare, rows = point.get("bare_seconds"), []
    for name, latency in point["methods"].items():
        speedup, alone, promised = latency["speedup"]["prefill"], latency["speedup"]["decoder"], latency["promised"]
        first = [name, seconds(latency["seconds"]["prefill"]), ratio(speedup)]
        first += [seconds(latency["seconds"]["decoder"]), ratio(alone), f"{promised:.2f}"]
        beside = [f"{bare['none'] / bare[name]:.2f}"] if bare else []
        rows.append([*first, f"{alone['value'] / promised:.1%}", *beside])
    header = ["method", "prefill", "times as fast", "decoder alone", "times as fast", "by exact FLOPs", "reached"]
    setting = f"Batch {point['batch']}, {point['image_tokens'][0]} image tokens, {point['repeats']} rounds:"
    blocks = [source(record), setting, table([*header, *(["bare layers"] if bare else [])], rows)]
    if "engine_seconds" in record:
        engine, whole = record["engine_seconds"], point["methods"]["none"]["seconds"]["prefill"]
        blocks.append(
            f"Of HiMAP's prefill {seconds(engine)} are the engine's own, {engine / whole:.2%} of the unpruned prefill."
        )
    return "\n\n".join(blocks)


def profile(record: dict[str, Any]) -> str:
    """The operations that a prefill spends most of its time in."""
    rows = [
        [row["method"], f"`{row['operation']}`", str(row["calls"]), seconds(row["seconds"]), f"{row['share']:.1%}"]
        for row in record["rows"]
    ]
    return f"{source(record)}\n\n{table(['method', 'operation', 'calls', 'its own time', 'share'], rows)}"


def decode(record: dict[str, Any]) -> str:
    """Times per further token, and the cache that is read for each."""
    rows = []
    for point in record["points"]:
        for name, latency in point["methods"].items():
            where = f"{point['batch']} x {point['image_tokens'][0]} ({point['repeats']})"
            share = latency["kv_bytes"] / point["methods"]["none"]["kv_bytes"]
            rows.append(
                [where, name, seconds(latency["seconds"]["tpot"]), ratio(latency["speedup"]["tpot"]), f"{share:.0%}"]
            )
    header = ["batch x image tokens (rounds)", "method", "a token", "times as fast", "KV bytes"]
    hook = (
        f"Before a pruned layer the engine works {record['hook_seconds'] * 1e6:.1f} µs a token, if nothing is padded."
    )
    return f"{source(record)}\n\n{table(header, rows)}\n\n{hook}"


def protocols(record: dict[str, Any]) -> str:
    """A long answer in both protocols."""
    rows = []
    for point in record["points"]:
        for name, latency in point["methods"].items():
            rows.append(
                [point["protocol"], name, seconds(latency["seconds"]["total"]), ratio(latency["speedup"]["total"])]
            )
    deployed, paper = (point["methods"]["none"]["seconds"]["total"] for point in record["points"])
    both = f"Unpruned, the authors' protocol takes {paper / deployed:.1f} times as long as the deployed one."
    return f"{source(record)}\n\n{table(['protocol', 'method', '64 tokens', 'times as fast'], rows)}\n\n{both}"


def saliency(record: dict[str, Any]) -> str:
    """Time and memory of saliency as multiples of a plain forward and backward."""
    rows = []
    for row in record["rows"]:
        cells = [str(row["tokens"]), row["method"]]
        if not row["fits"]:
            rows.append([*cells, "does not fit", "", "", ""])
            continue
        memory, time = (f"{row[name]:.2f}" if name in row else "" for name in ("memory_ratio", "time_ratio"))
        rows.append([*cells, f"{row['mb']:.0f} MB", memory, seconds(row["seconds"]), time])
    header = ["prompt tokens", "method", "peak memory", "of plain", "time", "of plain"]
    return f"{source(record)}\n\n{table(header, rows)}"


def laws(record: dict[str, Any]) -> str:
    """The test suite's law files, test by test."""
    rows = [
        [name, *(str(count[key]) for key in ("passed", "failed", "skipped"))] for name, count in record["files"].items()
    ]
    wrong = [f"- `{test}`: {said}" for test, said in record["failures"].items()]
    return "\n\n".join(
        [source(record), table(["file", "passed", "failed", "skipped"], rows), *_listed("Failed", wrong)]
    )


def bfloat16_laws(record: dict[str, Any]) -> str:
    """The laws restated for bfloat16: by law, the largest error of all families, kernels and pruners."""
    rows, tried = [], [check for check in record["checks"] if check["passed"] is not None]
    for law in dict.fromkeys(check["law"] for check in tried):
        checks = [check for check in tried if check["law"] == law]
        worst = max((check["error"] for check in checks if check["error"] is not None), default=None)
        passed = f"{sum(check['passed'] for check in checks)} of {len(checks)}"
        rows.append([law, passed, "?" if worst is None else f"{worst:.3g}", f"{checks[0]['limit']:g}"])
    wrong = [
        f"- {check['law']}, {check['where']}: {check['reason'] or format(check['error'], '.3g')}"
        for check in tried
        if not check["passed"]
    ]
    left_out = [f"- {name}: {reason}" for name, reason in record["kernels_left_out"].items()]
    left_out += [f"- {check['law']}: {check['reason']}" for check in record["checks"] if check["passed"] is None]
    blocks = [source(record), RESTATED, table(["law", "passed", "largest error", "allowed"], rows)]
    return "\n\n".join([*blocks, *_listed("Failed", wrong), *_listed("Cannot be tried here", left_out)])


def gpu_prefill(record: dict[str, Any]) -> str:
    """First-token times and memory by batch, what does not pay, and what a prefill asks of the device."""
    blocks = [source(record)]
    header = ["method", "first token", "times as fast", "by exact FLOPs", "reached", "peak memory"]
    for point in record["points"]:
        rows = []
        for name, latency in point["methods"].items():
            speedup, promised = latency["speedup"]["ttft"], latency["promised"]
            cells = [name, seconds(latency["seconds"]["ttft"]), ratio(speedup), f"{promised:.2f}"]
            rows.append([*cells, f"{speedup['value'] / promised:.0%}", gigabytes(latency["peak_bytes"])])
        for name, latency in point.get("alone", {}).items():
            rows.append([name, seconds(latency["seconds"]["ttft"]), "", "", "", gigabytes(latency["peak_bytes"])])
        rows += [[name, "does not fit", "", "", "", ""] for name in point["does_not_fit"]]
        blocks += [f"Batch {point['batch']}, {point['image_tokens']} image tokens:", table(header, rows)]
        speedups = {
            name: latency["speedup"]["ttft"] for name, latency in point["methods"].items() if name not in DROP_NOTHING
        }
        unsure = [name for name, speedup in speedups.items() if speedup["low"] <= 1 <= speedup["high"]]
        slower = [name for name, speedup in speedups.items() if speedup["high"] < 1]
        blocks += [f"No sure gain here: {', '.join(unsure)}."] if unsure else []
        blocks += [f"Slower here: {', '.join(slower)}."] if slower else []
    if record["name"] == TARGETED:
        blocks += _listed("Targets", targets(record["points"]))
    for work in record["work"]:
        names = ("operations", "launches", "copies", "waits")
        rows = [
            [name, *(str(counts[key]) for key in names), seconds(counts["issued"]), seconds(counts["done"])]
            if counts
            else [name, "does not fit", "", "", "", "", ""]
            for name, counts in work["methods"].items()
        ]
        blocks.append(
            f"What one prefill asks of the device, batch {work['batch']}, {work['image_tokens']} image tokens:"
        )
        blocks.append(table(["method", *names, "given out after", "done after"], rows))
    return "\n\n".join(blocks)


def targets(points: list[dict[str, Any]]) -> list[str]:
    """What the prefill should reach, and where it does not."""
    reached, added, at_most = {}, {}, {}
    for point in points:
        for name, latency in point["methods"].items():
            where, speedup = f"{name} at {point['batch']} x {point['image_tokens']}", latency["speedup"]["ttft"]
            if name not in DROP_NOTHING:
                at_most[where] = speedup["high"]
                if point["batch"] == 8:
                    reached[where] = speedup["value"] / latency["promised"]
            if name == "keep all" and point["batch"] == 1:
                added[where] = 1 / speedup["value"] - 1
    return [
        _target(f"at batch 8, at least {REACHED:.0%} of what FLOPs promise", reached, lambda share: share >= REACHED),
        _target(f"at batch 1, keeping all adds at most {ADDED:.0%}", added, lambda share: share <= ADDED),
        _target("nowhere surely slower than unpruned", at_most, lambda share: share >= 1),
    ]


def _target(wanted: str, measured: dict[str, float], met: Callable[[float], bool]) -> str:
    missed = [f"{where} ({share:.1%})" for where, share in measured.items() if not met(share)]
    outcome = f"missed by {', '.join(missed)}" if missed else "met" if measured else "not measured"
    return f"- {wanted}: {outcome}"


def gpu_protocols(record: dict[str, Any]) -> str:
    """Short answers in both protocols by both geometries."""
    rows = []
    for point in record["points"]:
        where = [point["name"], point["protocol"]]
        for name, latency in point["methods"].items():
            parts = [
                seconds(latency["seconds"]["ttft"]),
                seconds(latency["seconds"]["total"]),
                ratio(latency["speedup"]["total"]),
            ]
            rows.append([*where, name, *parts])
        for name, latency in point.get("alone", {}).items():
            rows.append([*where, name, seconds(latency["seconds"]["ttft"]), seconds(latency["seconds"]["total"]), ""])
        rows += [[*where, name, "does not fit", "", ""] for name in point["does_not_fit"]]
    answer = f"{record['points'][0]['new_tokens']} tokens"
    header = ["geometry", "protocol", "method", "first token", answer, "times as fast"]
    return f"{source(record)}\n\n{table(header, rows)}"


def gpu_decode(record: dict[str, Any]) -> str:
    """Tokens a second, and the largest batch that fits."""
    rows = []
    for point in record["points"]:
        where = f"{point['batch']} x {point['image_tokens']}"
        for name, latency in point["methods"].items():
            rate = point["batch"] / latency["seconds"]["tpot"]
            rows.append([where, name, f"{rate:.0f}", ratio(latency["speedup"]["tpot"]), gigabytes(latency["kv_bytes"])])
        for name, latency in point.get("alone", {}).items():
            rate = point["batch"] / latency["seconds"]["tpot"]
            rows.append([where, name, f"{rate:.0f}", "", gigabytes(latency["kv_bytes"])])
        rows += [[where, name, "does not fit", "", ""] for name in point["does_not_fit"]]
    largest = [
        [str(row["image_tokens"]), row["method"], str(row["computed"]), str(row["ran"]), str(row["too_many"] or "?")]
        for row in record["largest"]
    ]
    speed = table(["batch x image tokens", "method", "tokens a second", "times as fast", "KV cache"], rows)
    fits = table(["image tokens", "method", "largest batch by the cost model", "that ran", "too many"], largest)
    return f"{source(record)}\n\n{speed}\n\n{fits}"


def gpu_saliency(record: dict[str, Any]) -> str:
    """Time and memory of saliency beside plain reading, and beside naive attention matrices."""
    rows = [
        [str(row["tokens"]), row["method"], seconds(row["seconds"]), gigabytes(row["peak_bytes"])]
        if row["fits"]
        else [str(row["tokens"]), row["method"], "does not fit", ""]
        for row in record["rows"]
    ]
    return f"{source(record)}\n\n{table(['prompt tokens', 'method', 'time', 'peak memory'], rows)}"


def pico(record: dict[str, Any]) -> str:
    """The embedded model's answers against the CPU's."""
    rows = [[row["method"], str(row["asked"]), str(row["right"]), f"{row['identical']:.2%}"] for row in record["rows"]]
    wrong = [
        f"- {row['method']}, {said['id']}: {said['question']} Here {said['here']!r}, on the CPU {said['cpu']!r}."
        for row in record["rows"]
        for said in row["differing"]
    ]
    answers = table(["method", "asked", "right", "answered as on the CPU"], rows)
    return "\n\n".join([source(record), answers, *_listed("Answered otherwise", wrong)])


def _listed(title: str, items: list[str]) -> list[str]:
    return [f"{title}:", "\n".join(items)] if items else []


CPU: dict[str, Callable[[dict[str, Any]], str]] = {
    "cpu-prefill-7b-bfloat16": prefill,
    "cpu-prefill-13b-bfloat16": prefill,
    "cpu-prefill-7b-float32": prefill,
    "cpu-prefill-peers": prefill,
    "cpu-profile": profile,
    "cpu-decode": decode,
    "cpu-protocols": protocols,
    "cpu-saliency": saliency,
}
GPU: dict[str, Callable[[dict[str, Any]], str]] = {
    "gpu-laws": laws,
    "gpu-laws-bfloat16": bfloat16_laws,
    "gpu-prefill-7b": gpu_prefill,
    "gpu-prefill-13b": gpu_prefill,
    "gpu-protocols": gpu_protocols,
    "gpu-decode": gpu_decode,
    "gpu-saliency": gpu_saliency,
    "gpu-pico": pico,
}
BLOCKS = CPU | GPU


def picture(folder: Path, path: Path) -> None:
    """Theory against measurement: prefill by exact FLOPs, decoding by the bytes that a token reads, the cache."""
    prefills: list[Promise] = []
    decodes: list[Promise] = []
    caches: list[Promise] = []
    for name in CPU:
        record = load(folder, name) or {}
        for point in record.get("points", ()):
            none = point["methods"]["none"]
            for method, latency in point["methods"].items():
                if point["protocol"] != "deployed" or method == "none":
                    continue
                prefills.append(Promise(method, latency["promised"], Interval(**latency["speedup"]["decoder"])))
                if "tpot" in latency["speedup"]:
                    weights = record["weight_bytes"]
                    promised = (weights + none["kv_bytes"]) / (weights + latency["kv_bytes"])
                    decodes.append(Promise(method, promised, Interval(**latency["speedup"]["tpot"])))
                measured = none["kv_bytes"] / latency["kv_bytes"]
                promised = point["kv_promised"]["none"] / point["kv_promised"][method]
                caches.append(Promise(method, promised, Interval(measured, measured, measured)))
    panels = {
        "decoder's prefill, times as fast": prefills,
        "a token, times as fast": decodes,
        "KV cache, times as small": caches,
    }
    if panels := {label: panel for label, panel in panels.items() if panel}:
        promises(path, panels, "What theory promises, and what was measured")


def filled(page: str, folder: Path) -> str:
    """The page with every block written anew."""
    for name, render in BLOCKS.items():
        machine, _, stage = name.partition("-")
        record = load(folder, name)
        body = render(record) if record else NEVER.format(command=f"python -m bench.{machine} {stage}")
        page = put(page, name, body)
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
