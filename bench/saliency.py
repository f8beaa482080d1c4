"""Memory and time of saliency beside a plain forward and backward, and beside keeping every attention matrix.

    python bench/saliency.py                                # 500 to 3,000 prompt tokens; some minutes
    python bench/saliency.py --tokens 300 600 --layers 4    # a quick look

Every cell is a process of its own: a LLaVA of random weights reads one prompt (one image and text around it) and goes
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
from pathlib import Path

METHODS = ("plain", "saliency", "checkpointed", "naive")
ANSWER, IMAGE = 7, 3
M_MMAP_THRESHOLD = -3  # of malloc.h
TEXT = 50  # text tokens at least, about a third of them before the image


def memory_mb(name: str, path: str = "/proc/self/status") -> float:
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def build(options: argparse.Namespace, attn: str):
    import torch
    import transformers as hf

    side = math.isqrt(options.tokens[0] - TEXT)
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(
            vocab_size=options.vocab,
            hidden_size=options.hidden,
            intermediate_size=options.hidden * 11 // 4,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.kv_heads or options.heads,
            max_position_embeddings=8192,
        ),
        vision_config=hf.CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, projection_dim=32,
            image_size=4 * side, patch_size=4,
        ),
        image_token_index=IMAGE,
        image_seq_length=side * side,
    )  # fmt: skip
    torch.manual_seed(options.seed)
    model = hf.AutoModelForImageTextToText.from_config(config, attn_implementation=attn)
    return model.float().eval().requires_grad_(False), side


def prompt(options: argparse.Namespace, n_tokens: int, side: int):
    import torch

    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(10, options.vocab, (1, n_tokens), generator=generator)
    before = (n_tokens - side * side) // 3
    ids[:, before : before + side * side] = IMAGE
    pixels = torch.randn(1, 3, 4 * side, 4 * side, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def read_and_go_back(method: str, model, inputs) -> float:
    """One run; returns a number that all saliency methods must agree on."""
    import torch
    import torch.nn.functional as F

    from vlmflow.flow.saliency import saliency

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
    import torch

    torch.set_num_threads(options.threads)
    method, n_tokens = options.method, options.tokens[0]
    model, side = build(options, "eager" if method == "naive" else "sdpa")
    read_and_go_back(method, model, prompt(options, side * side + TEXT // 2, side))
    inputs, seconds = prompt(options, n_tokens, side), []
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)  # give back at once what is freed: the peak is of what is alive
    libc.malloc_trim(0)
    before = memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    read_and_go_back(method, model, inputs)
    peak = memory_mb("VmHWM") - before
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 28)  # and time it with memory that stays, short of what would lie in pieces
    for _ in range(options.repeats):
        start = time.perf_counter()
        total = read_and_go_back(method, model, inputs)
        seconds.append(time.perf_counter() - start)
    return {"mb": peak, "seconds": min(seconds), "total": total}


def in_a_process(options: argparse.Namespace, method: str, n_tokens: int) -> dict[str, float] | None:
    """What ``measure`` says, or None if the method ran out of memory."""
    limit = int(options.limit_gb * 2**30)
    passed = ["layers", "hidden", "heads", "kv_heads", "vocab", "seed", "repeats", "threads"]
    settings = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in passed]
    run = subprocess.run(
        [sys.executable, __file__, f"--method={method}", "--tokens", str(n_tokens), *settings],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    if run.returncode == 0:
        return json.loads(run.stdout.splitlines()[-1])
    if run.returncode < 0 or "can't allocate memory" in run.stderr or "MemoryError" in run.stderr:
        return None
    raise RuntimeError(f"{method} with {n_tokens} tokens failed:\n{run.stderr}")


def compare(options: argparse.Namespace) -> None:
    import torch
    import transformers

    rows, too_large = [], set()
    print(f"{'tokens':>7} {'method':>13} {'peak MB':>9} {'x plain':>8} {'seconds':>8} {'x plain':>8}", flush=True)
    for n_tokens in options.tokens:
        plain = None
        for method in options.methods:
            found = None if method in too_large else in_a_process(options, method, n_tokens)
            if found is None:
                too_large.add(method)  # nor will it fit a longer prompt
                print(f"{n_tokens:>7} {method:>13} does not fit", flush=True)
                rows.append({"tokens": n_tokens, "method": method, "fits": False})
                continue
            plain = found if method == "plain" else plain
            row = {"tokens": n_tokens, "method": method, "fits": True, **found}
            ratios = ["", ""]
            if plain is not None:
                row |= {"memory_ratio": found["mb"] / plain["mb"], "time_ratio": found["seconds"] / plain["seconds"]}
                ratios = [f"{row['memory_ratio']:.2f}", f"{row['time_ratio']:.2f}"]
            rows.append(row)
            memory, seconds = f"{found['mb']:>9.1f} {ratios[0]:>8}", f"{found['seconds']:>8.2f} {ratios[1]:>8}"
            print(f"{n_tokens:>7} {method:>13} {memory} {seconds}", flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"rows": rows, "settings": vars(options), "versions": versions}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[500, 1000, 2000, 3000], help="prompt lengths")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=0, help="0: as many as heads")
    parser.add_argument("--vocab", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=1, help="runs a cell; the fastest counts")
    parser.add_argument("--threads", type=int, default=1)
    available = memory_mb("MemAvailable", "/proc/meminfo") / 1024
    parser.add_argument("--limit-gb", type=float, default=round(0.8 * available, 1), help="memory of a process")
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
