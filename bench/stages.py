"""What the benchmarks of this folder share: stages that measure, run one by one, each writing one JSON file.

A stage returns a record in JSON's own types. A dry run is the same code at a size of seconds, on any machine.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench import ROOT
from vlmflow.core.cost import kv_bytes
from vlmflow.core.geometry import GEOMETRIES, Geometry
from vlmflow.pruners import PUBLISHED, Pruner, Unpruned
from vlmflow.records.files import versions, write_json
from vlmflow.speed.latency import Protocol, Request, compare, machine, synchronize
from vlmflow.speed.synthetic import random_model, random_prompt

TINY = Geometry(hidden=64, intermediate=96, layers=6, heads=4, kv_heads=4, head_dim=16, vocab=300)
SIDE = 24  # of an image, in tokens: 576
SHRINK = 6  # of that side in a dry run
FOLDER = ROOT / "docs" / "performance"
TEXT = 60
TIMED = 4  # of the bare layers that get as many rows
LIMIT = 480  # seconds that a stage may take
# how CUDA, cuDNN and cuBLAS say that memory does not suffice, the last when it cannot even begin
FULL = ("out of memory", "ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
T = TypeVar("T")


def subject(
    geometry: Geometry | str,
    dry: bool,
    dtype: torch.dtype,
    attn: str = "sdpa",
    device: str = "cpu",
    shared: bool = True,
    layers: int | None = None,
) -> Any:
    """A random model at a geometry's widths, on images of 576 tokens; in a dry run a tiny one."""
    widths = GEOMETRIES[geometry] if isinstance(geometry, str) else geometry
    widths, side, layers = (TINY, SIDE // SHRINK, None) if dry else (widths, SIDE, layers)
    return random_model(widths, side, layers=layers, share_weights=shared, dtype=dtype, device=device, attn=attn)


def described(model: Any) -> dict[str, Any]:
    """What was measured, and where; ``weight_bytes`` are those that decoding a token reads."""
    text, layers = model.config.text_config, model.model.language_model.layers
    widths = f"{text.num_hidden_layers} layers, {text.hidden_size} wide"
    read = sum(weight.nbytes for layer in layers for weight in layer.parameters()) + model.lm_head.weight.nbytes
    described = {"geometry": widths, "dtype": str(model.dtype).removeprefix("torch."), "weight_bytes": read}
    return described | {"machine": machine(model.device)}


def methods(layers: int) -> dict[str, Pruner]:
    """Each method's published defaults at a depth."""
    return {method.name: method.scaled(layers) for method in PUBLISHED}


def bare_layers(model: Any, schedule: Sequence[int], text_tokens: int, batch: int) -> float:
    """Seconds of the decoder layers called one after the other on fewer rows: pruning without an engine.

    Of the layers that get as many rows, a few are timed and stand for the others.
    """
    decoder, device = model.model.language_model, model.device
    states = torch.randn(batch, schedule[0] + text_tokens, model.config.text_config.hidden_size, device=device)
    states, positions = states.to(model.dtype), torch.arange(states.shape[1], device=device)[None]
    tables, seconds = decoder.rotary_emb(states, positions), 0.0
    for image_tokens, count in Counter(schedule).items():
        rows, timed = image_tokens + text_tokens, decoder.layers[: min(count, TIMED)]
        narrow = tuple(table[:, :rows] for table in tables)
        synchronize(device)
        start = time.perf_counter()
        with torch.inference_mode():
            for layer in timed:
                layer(states[:, :rows], position_embeddings=narrow)
        synchronize(device)
        seconds += (time.perf_counter() - start) * count / len(timed)
    return seconds


def measure(
    model: Any,
    pruners: Mapping[str, Pruner],
    image_tokens: int,
    batch: int,
    repeats: int,
    new_tokens: int = 1,
    protocol: Protocol = "deployed",
    bare: bool = False,
    dry: bool = False,
) -> dict[str, Any]:
    """Methods on one batch of random prompts, interleaved with each other and, if ``bare``, with bare layers."""
    if dry:
        image_tokens, new_tokens, repeats = image_tokens // SHRINK**2, min(new_tokens, 3), 1
    layers = len(model.model.language_model.layers)
    pruners = {"none": Unpruned()} | dict(pruners)
    alone: dict[str, list[float]] = {name: [] for name in pruners}

    def beside(name: str) -> None:
        if bare:
            schedule = pruners[name].schedule(layers, image_tokens)
            alone[name].append(bare_layers(model, schedule, TEXT, batch))

    request = Request(random_prompt(model, image_tokens, TEXT, batch), new_tokens, protocol)
    record = asdict(compare(model, request, pruners, repeats, each=beside))
    if bare:
        record["bare_seconds"] = {name: statistics.median(taken) for name, taken in alone.items()}
    geometry, width = Geometry.from_config(model.config), model.dtype.itemsize
    if protocol == "deployed":
        schedules = {name: pruner.schedule(layers, image_tokens) for name, pruner in pruners.items()}
        record["kv_promised"] = {
            name: batch * sum(kv_bytes(geometry, schedule, TEXT, decoded=new_tokens - 1, dtype_bytes=width))
            for name, schedule in schedules.items()
        }
    setting = {"batch": batch, "image_tokens": image_tokens, "new_tokens": new_tokens, "protocol": protocol}
    return setting | {"repeats": repeats} | record


def attempt(work: Callable[[], T]) -> T | None:
    """What ``work`` returns, None where the device's memory does not suffice; what it held is given back."""
    try:
        result = work()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in FULL):
            raise
        result = None
    release()
    return result


def release() -> None:
    """Give back memory that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(
    name: str,
    stages: Mapping[str, Callable[[bool], dict[str, Any]]],
    about: str,
    refused: Callable[[bool], Mapping[str, str]] = lambda dry: {},
    apart: Sequence[str] = (),
) -> None:
    """Run the stages that were asked for; each writes ``NAME-STAGE.json``, whole or not at all.

    ``refused`` says, knowing whether the run is dry, which stages cannot run here, and why; ``apart`` names those that
    run only when they are asked for. A stage that fails, or whose record counts what ``failed``, does not keep the
    next one from running.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = " but ".join(["all", *apart])
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(stages)}; default: {default}")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the JSON files")
    parser.add_argument("--dry", action="store_true", help="the same code at a size of seconds, on any machine")
    options = parser.parse_args()
    unknown = [stage for stage in options.stages if stage not in stages]
    if unknown:
        parser.error(f"unknown stage {unknown[0]}; choose from {', '.join(stages)}")
    reasons, failed = refused(options.dry), []
    chosen = options.stages or [stage for stage in stages if stage not in apart]
    for stage in chosen:
        if stage in reasons:
            print(f"{name} {stage}: cannot run here: {reasons[stage]}", flush=True)
            continue
        print(f"{name} {stage} ...", flush=True)
        start = time.perf_counter()
        try:
            record = stages[stage](options.dry)
        except Exception:
            traceback.print_exc()
            failed.append(stage)
            continue
        finally:
            release()
        record |= {"command": " ".join(["python", "-m", f"bench.{name}", stage]), "dry": options.dry}
        record |= {"versions": versions(), "seconds": round(time.perf_counter() - start, 1)}
        write_json(options.out / f"{name}-{stage}.json", record)
        print(f"{name} {stage}: {record['seconds']} s, wrote {options.out / f'{name}-{stage}.json'}", flush=True)
        if record["seconds"] > LIMIT:
            print(f"{name} {stage}: took longer than the {LIMIT} s that a stage may take", flush=True)
        if record.get("failed"):
            print(f"{name} {stage}: {record['failed']} failed", flush=True)
            failed.append(stage)
    if reasons.keys() >= set(chosen):
        print("nothing to run here")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
