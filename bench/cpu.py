"""Speed on a processor: prefill, decoding and the authors' protocol, each method beside the unpruned run.

    python -m bench.cpu                    # all stages but saliency; under 20 minutes on two cores
    python -m bench.cpu saliency           # some minutes more
    python -m bench.cpu decode --dry       # one stage, at a size of seconds

Models have random weights at true widths, and layers that share one set of them: the same arithmetic in a fraction of
the memory. ``docs/make/performance.py`` turns the JSON files into the tables and the picture of docs/performance.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import timeit
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as recorded

import vlmflow
from bench import ROOT, stages
from vlmflow.core.geometry import Geometry
from vlmflow.engine import attach
from vlmflow.pruners import Pruner
from vlmflow.speed.latency import machine
from vlmflow.speed.synthetic import random_prompt

NARROW = Geometry(hidden=1024, intermediate=2816, layers=8, heads=16, kv_heads=16, head_dim=64, vocab=32064)
TOP = 8  # operations of a profile
ENGINE, KERNEL = str(Path(vlmflow.__file__).parent), "sdpa_attention_forward"
CALLS = 1000  # of a hook, timed together


def prefill(dry: bool, name: str, dtype: torch.dtype, repeats: int, layers: int | None = None) -> dict[str, Any]:
    """576 image and 60 text tokens: HiMAP beside bare layers, and the engine's own part in it."""
    model = stages.subject(name, dry, dtype, layers=layers)
    himap = stages.methods(len(model.model.language_model.layers))["himap"]
    point = stages.measure(model, {"himap": himap}, 576, batch=1, repeats=repeats, bare=True, dry=dry)
    return stages.described(model) | {"name": name, "points": [point], "engine_seconds": engine_seconds(model, himap)}


def peers(dry: bool) -> dict[str, Any]:
    """The same prompt by every method, at a quarter of the depth."""
    model = stages.subject("llava-1.5-7b", dry, torch.bfloat16, layers=8)
    pruners = stages.methods(len(model.model.language_model.layers))
    point = stages.measure(model, pruners, 576, batch=1, repeats=3, dry=dry)
    return stages.described(model) | {"name": "llava-1.5-7b", "points": [point]}


def engine_seconds(model: Any, pruner: Pruner) -> float:
    """What one prefill spends in the engine and in what it calls, rankings and gathers: all but the model's kernel."""
    prompt, clock = random_prompt(model, model.config.image_seq_length, stages.TEXT, 1), EngineClock()
    with attach(model, pruner), torch.inference_mode():
        sys.setprofile(clock)
        model(**prompt, logits_to_keep=1)
        sys.setprofile(None)
    return clock.seconds


class EngineClock:
    """A profile function for ``sys.setprofile``: it runs in the engine's calls, and stands still in a kernel's."""

    def __init__(self) -> None:
        self.seconds = self.since = 0.0
        self.runs = [False]  # for each call on the stack

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        before, now = self.runs[-1], time.perf_counter()
        if event == "call":
            code = frame.f_code
            inherited = before and code.co_name != KERNEL
            self.runs.append(inherited or code.co_filename.startswith(ENGINE))
        elif event == "return" and len(self.runs) > 1:
            self.runs.pop()
        if before and not self.runs[-1]:
            self.seconds += now - self.since
        elif self.runs[-1] and not before:
            self.since = now


def profile(dry: bool) -> dict[str, Any]:
    """Which tensor operations one prefill spends its time in, unpruned and under HiMAP."""
    model = stages.subject("llava-1.5-7b", dry, torch.bfloat16)
    inputs = random_prompt(model, 16 if dry else 576, stages.TEXT, 1)
    himap = stages.methods(len(model.model.language_model.layers))["himap"]
    rows = []
    for name in ("none", "himap"):
        pruned = attach(model, himap) if name == "himap" else nullcontext()
        with pruned, torch.inference_mode(), recorded(activities=[ProfilerActivity.CPU]) as seen:
            model(**inputs, logits_to_keep=1)
        events = sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)
        whole = sum(event.self_cpu_time_total for event in events)
        rows += [
            {
                "method": name,
                "operation": event.key,
                "calls": event.count,
                "seconds": event.self_cpu_time_total / 1e6,
                "share": event.self_cpu_time_total / whole,
            }
            for event in events[:TOP]
        ]
    return stages.described(model) | {"name": "llava-1.5-7b", "rows": rows}


def decode(dry: bool) -> dict[str, Any]:
    """Time per token after the first, where the cache is short and where it is long."""
    model = stages.subject(NARROW, dry, torch.bfloat16)
    pruners = stages.methods(len(model.model.language_model.layers))
    himap = {"himap": pruners["himap"]}
    points = [
        stages.measure(model, chosen, image_tokens, batch, repeats, new_tokens, dry=dry)
        for chosen, image_tokens, batch, repeats, new_tokens in (
            (pruners, 576, 1, 8, 32),
            (himap, 576, 8, 3, 16),
            (himap, 2880, 1, 3, 16),
            (himap, 2880, 8, 2, 16),
        )
    ]
    return stages.described(model) | {"points": points, "hook_seconds": hook_seconds(model, pruners["himap"])}


def hook_seconds(model: Any, pruner: Pruner) -> float:
    """What the engine does before each pruned layer when a token is decoded, no prompt being padded."""
    layer = model.model.language_model.layers[-1]
    prompt = random_prompt(model, model.config.image_seq_length, stages.TEXT, 1)
    with attach(model, pruner), torch.inference_mode():
        kwargs = {"past_key_values": model(**prompt, use_cache=True).past_key_values, "attention_mask": None}
        (hook,) = layer._forward_pre_hooks.values()
        token = torch.zeros(1, 1, model.config.text_config.hidden_size, dtype=model.dtype)
        return min(timeit.repeat(lambda: hook(layer, (token,), kwargs), number=CALLS, repeat=5)) / CALLS


def protocols(dry: bool) -> dict[str, Any]:
    """An answer of 64 tokens as models are deployed, and as the authors' script runs, on the same weights."""
    points = []
    for protocol, attn in (("deployed", "sdpa"), ("paper", "eager")):
        model = stages.subject(NARROW, dry, torch.float32, attn)
        pruners = {"himap": stages.methods(len(model.model.language_model.layers))["himap"]}
        points.append(stages.measure(model, pruners, 576, 1, repeats=2, new_tokens=64, protocol=protocol, dry=dry))
    return stages.described(model) | {"points": points}


def saliency(dry: bool) -> dict[str, Any]:
    """Following the flow beside a plain forward and backward, and beside keeping every attention matrix."""
    small = ["--tokens", "150", "--layers", "2", "--hidden", "64", "--heads", "4"]
    chosen = [*(small if dry else []), "--threads", str(torch.get_num_threads())]
    command = [sys.executable, "-m", "bench.saliency", *chosen]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    measured = json.loads(run.stdout.splitlines()[-1])
    settings = measured["settings"]
    described = {"geometry": f"{settings['layers']} layers, {settings['hidden']} wide", "dtype": "float32"}
    where = machine(torch.device("cpu")) | {"threads": settings["threads"]}
    return described | {"machine": where, "rows": measured["rows"], "settings": settings}


STAGES = {
    "prefill-7b-bfloat16": lambda dry: prefill(dry, "llava-1.5-7b", torch.bfloat16, repeats=4),
    "prefill-13b-bfloat16": lambda dry: prefill(dry, "llava-1.5-13b", torch.bfloat16, repeats=2),
    "prefill-7b-float32": lambda dry: prefill(dry, "llava-1.5-7b", torch.float32, repeats=3, layers=8),
    "prefill-peers": peers,
    "profile": profile,
    "decode": decode,
    "protocols": protocols,
    "saliency": saliency,
}

if __name__ == "__main__":
    stages.main("cpu", STAGES, __doc__ or "", apart=["saliency"])
