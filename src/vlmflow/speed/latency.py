"""Time and memory measured side by side: what pruning saves on this machine, in two protocols.

``deployed`` is how models are run: KV cache, fused attention. ``paper`` is how the HiMAP authors' script runs: no
cache, eager attention, every attention matrix returned. Runs are interleaved (A B A B ...), so that drifts hit all
methods alike.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vlmflow.core.statistics import Interval, draws
from vlmflow.engine import Trace, attach
from vlmflow.engine.target import Target
from vlmflow.pruners import Pruner, Unpruned
from vlmflow.records.schema import BenchPoint, LatencyRecord

Protocol = Literal["deployed", "paper"]


@dataclass(frozen=True)
class Request:
    """A batch of prompts and how many tokens to answer it with, end-of-sequence ignored."""

    inputs: Mapping[str, Tensor]
    new_tokens: int = 1
    protocol: Protocol = "deployed"


@dataclass(frozen=True)
class Timing:
    """One run, in seconds: until the decoder starts, until it ends, to the first token, then each further token.

    ``peak_bytes`` is the most memory held above what was held before, None where the platform does not tell;
    ``kv_bytes`` what the KV cache holds at the end.
    """

    vision: float
    decoder: float
    head: float
    decode: tuple[float, ...]
    peak_bytes: int | None
    kv_bytes: int

    @property
    def parts(self) -> dict[str, float]:
        """What is compared: ``ttft`` is the time to first token, ``tpot`` the median per output token after it.

        ``prefill`` is the decoder and what follows it to the first token (lm_head above all), ``decoder`` that alone.
        """
        prefill = self.decoder + self.head
        first = self.vision + prefill
        parts = {"vision": self.vision, "decoder": self.decoder, "prefill": prefill, "ttft": first}
        if self.decode:
            parts["tpot"] = statistics.median(self.decode)
        return parts | {"total": first + sum(self.decode)}


def ratio_of_medians(above: Sequence[float], below: Sequence[float]) -> Interval:
    """How many times as fast: ratio of medians over interleaved rounds, with its 95 % bootstrap interval."""
    first, second = np.array(above), np.array(below)
    rounds = np.concatenate(list(draws(len(first), seed=0)))
    resampled = np.median(first[rounds], 1) / np.median(second[rounds], 1)
    return Interval.of(float(np.median(first) / np.median(second)), resampled)


def summed_up(
    pruner: Pruner, promised: float | None, unpruned: Sequence[Timing], runs: Sequence[Timing]
) -> LatencyRecord:
    """A method's runs beside the unpruned runs of the same rounds."""
    seconds = {part: [timing.parts[part] for timing in runs] for part in runs[0].parts}
    peaks = [timing.peak_bytes for timing in runs if timing.peak_bytes is not None]
    return LatencyRecord(
        pruner=pruner.to_dict(),
        seconds={part: statistics.median(taken) for part, taken in seconds.items()},
        speedup={
            part: ratio_of_medians([timing.parts[part] for timing in unpruned], taken)
            for part, taken in seconds.items()
        },
        promised=promised,
        peak_bytes=max(peaks, default=None),
        kv_bytes=runs[0].kv_bytes,
    )


def compare(
    model: nn.Module,
    request: Request,
    pruners: Mapping[str, Pruner],
    repeats: int,
    each: Callable[[str], object] = lambda _: None,
) -> BenchPoint:
    """Measure methods on a request, beside the bare model; ``each`` is called after every run with its method's name.

    A round that is not timed comes first. ``none`` runs with nothing attached.
    """
    pruners = {"none": Unpruned()} | dict(pruners)
    traces = {name: warm_up(model, request, pruner) for name, pruner in pruners.items()}
    runs: dict[str, list[Timing]] = {name: [] for name in pruners}
    for _ in range(repeats):
        for name, pruner in pruners.items():
            runs[name].append(run(model, request, pruner))
            each(name)
    methods = {
        name: summed_up(pruner, promised_speedup(traces[name]), runs["none"], runs[name])
        for name, pruner in pruners.items()
    }
    images, tokens = traces["none"].image_tokens[0], traces["none"].tokens[0]
    texts = [together - image for together, image in zip(tokens, images, strict=True)]
    return BenchPoint(len(images), request.new_tokens, list(images), texts, methods)


def warm_up(model: nn.Module, request: Request, pruner: Pruner) -> Trace:
    """Answer once, untimed and with a cache whatever the protocol: what the pruner did to the prompts."""
    with attach(model, pruner) as trace, torch.inference_mode():
        _generate(model, request, stamp=lambda: None)
    return trace


def run(model: nn.Module, request: Request, pruner: Pruner) -> Timing:
    """Answer a request once, timed."""
    device = request.inputs["input_ids"].device
    stamps: list[float] = []

    def stamp(*_: object) -> None:
        synchronize(device)
        stamps.append(time.perf_counter())

    decoder = Target.find(model).text
    entry = decoder.register_forward_pre_hook(lambda *_: stamp() if len(stamps) == 1 else None)
    exit_ = decoder.register_forward_hook(lambda *_: stamp() if len(stamps) == 2 else None)
    answer = _generate if request.protocol == "deployed" else _reread
    try:
        with attached(model, pruner), torch.inference_mode(), peak_memory(device) as peak:
            stamp()
            kv_bytes = answer(model, request, stamp)
    finally:
        entry.remove()
        exit_.remove()
    start, entered, left, *tokens = stamps
    decode = tuple(after - before for before, after in pairwise(tokens))
    return Timing(entered - start, left - entered, tokens[0] - left, decode, peak(), kv_bytes)


def promised_speedup(trace: Trace) -> float | None:
    """The prefill's speed-up if time were exact FLOPs; None for a model whose widths are not known."""
    try:
        return 1 / trace.cost().share("exact_flops")
    except ValueError:
        return None


def attached(model: nn.Module, pruner: Pruner) -> AbstractContextManager[object]:
    """``attach``, but the bare model for a method that drops nothing."""
    return attach(model, pruner) if pruner.stages(len(Target.find(model).layers), 0) else nullcontext()


def _generate(model: Any, request: Request, stamp: Callable[[], None]) -> int:
    """Greedy generation as users run it; returns the bytes that its cache holds at the end."""

    def stamped(ids: Tensor, _scores: object, **_: object) -> Tensor:
        stamp()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    out = model.generate(
        **request.inputs,
        do_sample=False,
        min_new_tokens=request.new_tokens,
        max_new_tokens=request.new_tokens,
        stopping_criteria=[stamped],
        return_dict_in_generate=True,
    )
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)


def _reread(model: Any, request: Request, stamp: Callable[[], None]) -> int:
    """The authors' way: the whole text again for every token, all attention matrices returned, no cache."""
    inputs = dict(request.inputs)
    for _ in range(request.new_tokens):
        out = model(**inputs, use_cache=False, output_attentions=True)
        token = out.logits[:, -1:].argmax(-1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
        stamp()
    return 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """The most memory held inside the block above what was held at its start: CUDA's allocator, or Linux's RSS."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
    elif Path("/proc/self/clear_refs").exists():
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        yield lambda: max(0, _resident("VmHWM") - before)  # Linux counts in lots of pages, by thread
    else:
        yield lambda: None


def machine(device: torch.device) -> dict[str, Any]:
    """Where a figure was measured."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    capability = torch.backends.cpu.get_cpu_capability()
    return {"device": f"{_processor()} ({capability})", "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
