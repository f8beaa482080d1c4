"""How fast and how large on a GPU: prefill, decoding, both protocols, saliency, at full depth with a weight a layer.

Time is what a user waits for: the host's clock, read when the device has done what it was given. CUDA events would time
the device alone, and miss what a launch-bound prefill loses: the host's own time. The reads fall where ``generate``
waits for the device anyhow (the first token, every further one) and once between vision and decoder, for all methods
alike. How much of a prefill the host needs to give out the work stands beside it (``issued``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench import saliency, stages
from vlmflow.core.cost import kv_bytes
from vlmflow.core.geometry import Geometry
from vlmflow.pruners import HiMAP, Pruner, Unpruned
from vlmflow.speed.latency import Protocol, Request, Timing, attached, peak_memory, run, synchronize
from vlmflow.speed.synthetic import random_prompt

PREFILLS = ((576, 1), (1152, 1), (2880, 1), (576, 8), (2880, 8), (576, 32), (2880, 32))  # image tokens, batch
DECODES = ((576, 1), (576, 8), (576, 64), (2880, 1), (2880, 8))
PROMPTS = (700, 1500, 3000)  # tokens of a prompt to follow the flow in
READERS = {"plain": "sdpa", "saliency": "sdpa", "checkpointed": "sdpa", "naive": "eager"}
SMALL = 10_000  # image tokens of a batch up to which a prefill takes a fraction of a second
TRIES = 8  # of a batch size
DRY_MEMORY = 1 << 21  # bytes that a dry run takes for the device's


def subject(name: str, dry: bool, attn: str = "sdpa") -> Any:
    """A geometry in bfloat16 with a set of weights for each layer."""
    return stages.subject(name, dry, torch.bfloat16, attn, device="cpu" if dry else "cuda", shared=False)


def prefill(dry: bool, name: str) -> dict[str, Any]:
    """Time to the first token by batch and image tokens, and what one prompt's prefill asks of the device."""
    model = subject(name, dry)
    layers = len(model.model.language_model.layers)
    pruners = {"keep all": keep_all(layers)} | stages.methods(layers)
    points = [
        cell(model, pruners, images, batch, 20 if images * batch < SMALL else 5, dry=dry)
        for images, batch in (PREFILLS[:1] if dry else PREFILLS)
    ]
    work = []
    for images in (576,) if dry else (576, 2880):
        inputs = random_prompt(model, images // stages.SHRINK**2 if dry else images, stages.TEXT, 1)
        counts = {
            label: stages.attempt(lambda p=pruner, i=inputs: asked_of_device(model, i, p))
            for label, pruner in _with_none(pruners).items()
        }
        work.append({"batch": 1, "image_tokens": images, "methods": counts})
    return stages.described(model) | {"name": name, "points": points, "work": work}


def protocols(dry: bool) -> dict[str, Any]:
    """A short answer by the 7B and the 13B geometry as deployed, and as the authors' script runs (Figures 7 and 8)."""
    points: list[dict[str, Any]] = []
    record: dict[str, Any] = {}
    settings: tuple[tuple[Protocol, str], ...] = (("deployed", "sdpa"), ("paper", "eager"))
    for name in ("llava-1.5-7b", "llava-1.5-13b"):
        for protocol, attn in settings:
            model = subject(name, dry, attn)
            pruners = stages.methods(len(model.model.language_model.layers))
            point = cell(model, pruners, 576, 1, repeats=5, new_tokens=16, protocol=protocol, dry=dry)
            points.append({"name": name} | point)
            record = stages.described(model)
            del model  # before the next one is made: two do not fit
            stages.release()
    return record | {"geometry": "llava-1.5-7b and llava-1.5-13b", "points": points}


def decode(dry: bool) -> dict[str, Any]:
    """Time per further token by batch, and the largest batch that fits, with and without pruning."""
    model = subject("llava-1.5-7b", dry)
    pruners = stages.methods(len(model.model.language_model.layers))
    points = [
        cell(model, pruners, images, batch, repeats=3, new_tokens=33, dry=dry)
        for images, batch in (DECODES[:1] if dry else DECODES)
    ]
    largest = [
        {"image_tokens": images, "method": name} | largest_batch(model, pruner, images, dry)
        for images in (576, 2880)
        for name, pruner in (("none", Unpruned()), ("himap", pruners["himap"]))
    ]
    return stages.described(model) | {"points": points, "largest": largest}


def flow(dry: bool) -> dict[str, Any]:
    """Time and peak memory of saliency beside a plain forward and backward, and beside keeping every attention map."""
    rows: list[dict[str, Any]] = []
    record: dict[str, Any] = {}
    for attn in ("sdpa", "eager"):
        model = subject("llava-1.5-7b", dry, attn)
        record = stages.described(model)
        for length in PROMPTS:
            images, tokens = (16, length // stages.SHRINK**2 + 16) if dry else (576, length)
            inputs = random_prompt(model, images, tokens - images, 1)
            for method in (method for method, kernel in READERS.items() if kernel == attn):
                row = stages.attempt(lambda m=method, i=inputs, b=model: read_and_go_back(m, b, i, 1 if dry else 3))
                rows.append({"tokens": length, "method": method, "fits": row is not None} | (row or {}))
        del model
        stages.release()
    return record | {"rows": sorted(rows, key=lambda row: (row["tokens"], list(READERS).index(row["method"])))}


def cell(
    model: Any, pruners: Mapping[str, Pruner], image_tokens: int, batch: int, repeats: int, **how: Any
) -> dict[str, Any]:
    """``stages.measure`` for those methods that fit; where they do not beside the unpruned run, each stands alone."""
    dry, new_tokens, protocol = how["dry"], how.get("new_tokens", 1), how.get("protocol", "deployed")
    images = image_tokens
    if dry:  # as stages.measure does
        images, new_tokens = image_tokens // stages.SHRINK**2, min(new_tokens, 3)
    prompt = stages.attempt(lambda: random_prompt(model, images, stages.TEXT, batch))
    request = None if prompt is None else Request(prompt, new_tokens, protocol)
    everyone = _with_none(pruners)
    first = {
        name: None if request is None else stages.attempt(lambda p=pruner, r=request: run(model, r, p))
        for name, pruner in everyone.items()
    }
    setting = {"batch": batch, "image_tokens": images, "new_tokens": new_tokens, "protocol": protocol}
    setting["does_not_fit"] = [name for name, timing in first.items() if timing is None]
    if first["none"] is not None:
        fitting = {name: pruner for name, pruner in pruners.items() if first[name] is not None}
        measured = stages.attempt(lambda: stages.measure(model, fitting, image_tokens, batch, repeats, **how))
        if measured is not None:
            return measured | setting
    alone = {
        name: by_itself(model, request, everyone[name], timing, 1 if dry else 3)
        for name, timing in first.items()
        if timing is not None
    }
    return setting | {"alone": alone, "methods": {}}


def by_itself(model: Any, request: Any, pruner: Pruner, first: Timing, repeats: int) -> dict[str, Any]:
    """A method's medians with nothing beside it; those of its first run where it does not fit again."""
    timings = stages.attempt(lambda: [run(model, request, pruner) for _ in range(repeats)]) or [first]
    seconds = {part: statistics.median(timing.parts[part] for timing in timings) for part in first.parts}
    peaks = [timing.peak_bytes for timing in timings if timing.peak_bytes is not None]
    return {"seconds": seconds, "peak_bytes": max(peaks, default=None), "kv_bytes": first.kv_bytes}


def asked_of_device(model: Any, inputs: Mapping[str, Tensor], pruner: Pruner) -> dict[str, Any]:
    """One prefill's tensor operations, kernel launches and waits of the host; and the time until all is given out.

    Where ``issued`` is nearly ``done``, the host is what the device waits for, and fewer rows save nothing.
    """

    def read() -> None:
        model(**inputs, use_cache=True, logits_to_keep=1)

    on_gpu = model.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    issued, done = [], []
    with attached(model, pruner), torch.inference_mode():
        read()
        for _ in range(5):
            synchronize(model.device)
            start = time.perf_counter()
            read()
            issued.append(time.perf_counter() - start)
            synchronize(model.device)
            done.append(time.perf_counter() - start)
        with profile(activities=activities) as profiled:
            read()
    counts = {event.key: event.count for event in profiled.key_averages()}
    return counted(counts) | {"issued": statistics.median(issued), "done": statistics.median(done)}


def counted(events: Mapping[str, int]) -> dict[str, int]:
    """Sort a profile's events by name: operations, launches, and what the host waits for.

    ``cudaDeviceSynchronize`` is left out: nobody calls it but the profiler, at its end.
    """

    def total(wanted: Callable[[str], bool]) -> int:
        return sum(count for name, count in events.items() if wanted(name))

    return {
        "operations": total(lambda name: name.startswith("aten::")),
        "launches": total(lambda name: name.startswith("cu") and "LaunchKernel" in name),
        "copies": total(lambda name: name.startswith("cudaMemcpy")),
        "waits": total(lambda name: name in ("cudaStreamSynchronize", "cudaEventSynchronize")),
    }


def largest_batch(model: Any, pruner: Pruner, image_tokens: int, dry: bool) -> dict[str, Any]:
    """How many prompts fit at once: by the cost model and the free memory, and by trying from there up and down.

    ``ran`` is the most that ran, ``too_many`` the fewest that did not, None where none was found.
    """
    images = image_tokens // stages.SHRINK**2 if dry else image_tokens
    needed = prompt_bytes(Geometry.from_config(model.config), pruner, images, model.dtype.itemsize)
    stages.release()
    free = DRY_MEMORY if dry else torch.cuda.mem_get_info()[0]

    def work(batch: int) -> bool:
        run(model, Request(random_prompt(model, images, stages.TEXT, batch), new_tokens=2), pruner)
        return True

    ran, too_many, batch = 0, None, max(1, free // needed)
    for _ in range(TRIES):
        if stages.attempt(lambda b=batch: work(b)):
            ran = batch
        else:
            too_many = batch
        batch = ran + max(1, ran // 8) if too_many is None else (ran + too_many) // 2
        if batch == ran:
            break
    return {"free_bytes": free, "prompt_bytes": needed, "computed": free // needed, "ran": ran, "too_many": too_many}


def prompt_bytes(geometry: Geometry, pruner: Pruner, images: int, width: int) -> int:
    """The most memory that a prompt takes while it is read: the caches that are filled, and one layer at work.

    A layer holds the states, queries, keys and values (8 widths) and the MLP (3 inner widths) of the rows it is given.
    """
    schedule = pruner.schedule(geometry.layers, images)
    filled = accumulate(kv_bytes(geometry, schedule, stages.TEXT, decoded=1, dtype_bytes=width))
    row = (8 * geometry.hidden + 3 * geometry.intermediate) * width
    return max(cache + (kept + stages.TEXT) * row for cache, kept in zip(filled, schedule, strict=True))


def read_and_go_back(method: str, model: Any, inputs: Mapping[str, Tensor], repeats: int) -> dict[str, Any]:
    """Median seconds and peak memory of one way to read a prompt and go back from the loss; the first run warms up."""
    seconds, peaks = [], []
    for _ in range(repeats + 1):
        with peak_memory(model.device) as peak, torch.device(model.device):
            synchronize(model.device)
            start = time.perf_counter()
            saliency.read_and_go_back(method, model, inputs)
            synchronize(model.device)
            seconds.append(time.perf_counter() - start)
            peaks.append(peak())
    return {"seconds": statistics.median(seconds[1:]), "peak_bytes": peaks[-1]}


def keep_all(layers: int) -> HiMAP:
    """HiMAP that drops nothing: what the engine itself costs, ranking included."""
    preset = HiMAP.scaled(layers)
    return HiMAP(k1=preset.k1, r1=0.0, k2=preset.k2, r2=0.0)


def _with_none(pruners: Mapping[str, Pruner]) -> dict[str, Pruner]:
    return {"none": Unpruned()} | dict(pruners)
