"""Memory and time of saliency beside a plain forward and backward, and beside keeping every attention matrix.

    python -m bench.saliency                                # 500 to 3,000 prompt tokens; some minutes
    python -m bench.saliency --tokens 300 600 --layers 4    # a quick look

Every cell is a process of its own: a LLaVA of random weights reads one prompt (one image, then text) and goes
back from the loss of one answer token, weights frozen. Memory is the peak of the process in one run, above what it
held with the model loaded and warm, with malloc told to give back at once what is freed (Linux, glibc); time is that
of further runs, without. Methods: ``plain``, fused attention, nothing measured; ``saliency``; ``checkpointed``,
saliency that recomputes each layer; ``naive``, eager attention that keeps every matrix and its gradient. A method that
runs out of ``--limit-gb`` does not fit. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import ROOT
from vlmflow.core.geometry import Geometry
from vlmflow.flow.saliency import saliency
from vlmflow.records.files import versions
from vlmflow.speed.latency import peak_memory
from vlmflow.speed.synthetic import random_model, random_prompt

METHODS = ("plain", "saliency", "checkpointed", "naive")
ANSWER = 7
M_MMAP_THRESHOLD = -3  # of malloc.h
TEXT = 50  # text tokens at least


def read_and_go_back(method: str, model: Any, inputs: Mapping[str, Tensor]) -> float:
    """One run; returns a number that all saliency methods must agree on."""
    if method in ("saliency", "checkpointed"):
        return float(saliency(model, inputs, ANSWER, checkpointing=method == "checkpointed").blocks.sum())
    leaves = []

    def leaf(module, args, output):
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()

    handle = model.get_input_embeddings().register_forward_hook(leaf)
    try:
        naive = method == "naive"
        out = model(**inputs, use_cache=False, logits_to_keep=1, output_attentions=naive)
        loss = F.cross_entropy(out.logits[:, -1].float(), torch.tensor([ANSWER]))
        if not naive:
            loss.backward(inputs=leaves)
            return 0.0
        gradients = torch.autograd.grad(loss, out.attentions)
        with torch.no_grad():
            pairs = zip(out.attentions, gradients, strict=True)
            return float(sum((weights * gradient).sum(1).abs().double().sum() for weights, gradient in pairs))
    finally:
        handle.remove()


def measure(options: argparse.Namespace) -> dict[str, float]:
    """In a process of its own: one method on one prompt."""
    torch.set_num_threads(options.threads)
    method, (n_tokens,) = options.method, options.tokens
    side = math.isqrt(n_tokens - TEXT)
    geometry = Geometry(
        hidden=options.hidden,
        intermediate=options.hidden * 11 // 4,
        layers=options.layers,
        heads=options.heads,
        kv_heads=options.kv_heads or options.heads,
        head_dim=options.hidden // options.heads,
        vocab=options.vocab,
    )
    model = random_model(geometry, side, attn="eager" if method == "naive" else "sdpa")
    read_and_go_back(method, model, random_prompt(model, side * side, TEXT // 2, 1))
    inputs, seconds = random_prompt(model, side * side, n_tokens - side * side, 1), []
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)  # give back at once what is freed: the peak is of what is alive
    libc.malloc_trim(0)
    with peak_memory(model.device) as peak:
        total = read_and_go_back(method, model, inputs)
        held = peak()
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 28)  # and time it with memory that stays, short of what would lie in pieces
    for _ in range(options.repeats):
        start = time.perf_counter()
        read_and_go_back(method, model, inputs)
        seconds.append(time.perf_counter() - start)
    return {"mb": held / 2**20, "seconds": min(seconds), "total": total}


def available_gb() -> float:
    """Memory that a new process can get without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


def in_a_process(options: argparse.Namespace, method: str, n_tokens: int) -> dict[str, float] | None:
    """What ``measure`` says, or None if the method ran out of memory."""
    limit = int(options.limit_gb * 2**30)
    passed = ["layers", "hidden", "heads", "kv_heads", "vocab", "repeats", "threads"]
    settings = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in passed]
    run = subprocess.run(
        [sys.executable, "-m", "bench.saliency", f"--method={method}", "--tokens", str(n_tokens), *settings],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    if run.returncode == 0:
        return json.loads(run.stdout.splitlines()[-1])
    if run.returncode < 0 or "can't allocate memory" in run.stderr or "MemoryError" in run.stderr:
        return None
    raise RuntimeError(f"{method} with {n_tokens} tokens failed:\n{run.stderr}")


def compare(options: argparse.Namespace) -> None:
    """Every method on every prompt, printed as they come, and the record of them all."""
    rows, too_large = [], set()
    print(f"{'tokens':>7} {'method':>13} {'peak MB':>9} {'x plain':>8} {'seconds':>8} {'x plain':>8}", flush=True)
    for n_tokens in options.tokens:
        plain = None
        for method in options.methods:
            measured = None if method in too_large else in_a_process(options, method, n_tokens)
            if measured is None:
                too_large.add(method)  # nor will it fit a longer prompt
                print(f"{n_tokens:>7} {method:>13} does not fit", flush=True)
                rows.append({"tokens": n_tokens, "method": method, "fits": False})
                continue
            plain = measured if method == "plain" else plain
            row = {"tokens": n_tokens, "method": method, "fits": True, **measured}
            ratios = ["", ""]
            if plain is not None:
                row |= {
                    "memory_ratio": measured["mb"] / plain["mb"],
                    "time_ratio": measured["seconds"] / plain["seconds"],
                }
                ratios = [f"{row['memory_ratio']:.2f}", f"{row['time_ratio']:.2f}"]
            rows.append(row)
            memory, seconds = f"{measured['mb']:>9.1f} {ratios[0]:>8}", f"{measured['seconds']:>8.2f} {ratios[1]:>8}"
            print(f"{n_tokens:>7} {method:>13} {memory} {seconds}", flush=True)
    print(json.dumps({"rows": rows, "settings": vars(options), "versions": versions()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[500, 1000, 2000, 3000], help="prompt lengths")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=0, help="0: as many as heads")
    parser.add_argument("--vocab", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=1, help="runs a cell; the fastest counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-gb", type=float, default=round(0.8 * available_gb(), 1), help="memory of a process")
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.tokens) < 2 * TEXT:
        parser.error(f"--tokens must be at least {2 * TEXT}")
    if options.method:
        print(json.dumps(measure(options)))
    else:
        del options.method
        compare(options)


if __name__ == "__main__":
    main()
