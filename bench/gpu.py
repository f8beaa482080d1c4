"""Proofs and figures on a GPU, in one command that needs no network and no checkpoint.

    python -m bench.gpu                    # all stages; each under 8 minutes on an H100
    python -m bench.gpu laws decode        # some of them
    python -m bench.gpu --dry              # the same code at a size of seconds, on any machine

It begins with a table of what it found; a stage that cannot run here says why, and without CUDA nothing runs. Models
have random weights at true widths and depths; answers are those of the embedded model. Where a law fails, its stage
writes its file, says how many, and the exit code is 1. ``docs/make/performance.py`` turns the JSON files into the
tables of docs/performance.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

# read when torch begins: sizes change from cell to cell, and memory in pieces would make large ones seem not to fit
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch

from bench import gpu_figures, gpu_proofs, stages
from vlmflow.core.geometry import GEOMETRIES, Geometry
from vlmflow.records.files import versions

STAGES: dict[str, Callable[[bool], dict[str, Any]]] = {
    "laws": gpu_proofs.laws,
    "laws-bfloat16": gpu_proofs.bfloat16_laws,
    "prefill-7b": partial(gpu_figures.prefill, name="llava-1.5-7b"),
    "prefill-13b": partial(gpu_figures.prefill, name="llava-1.5-13b"),
    "protocols": gpu_figures.protocols,
    "decode": gpu_figures.decode,
    "saliency": gpu_figures.flow,
    "pico": gpu_proofs.pico,
}
WEIGHTS = {  # the stages' largest models
    "prefill-7b": "llava-1.5-7b",
    "prefill-13b": "llava-1.5-13b",
    "protocols": "llava-1.5-13b",
    "decode": "llava-1.5-7b",
    "saliency": "llava-1.5-7b",
}
TESTED_WITH = ("pytest", "pytest_timeout", "xdist", "beartype", "accelerate", "peft")


def equipment() -> dict[str, str]:
    """What there is to run on."""
    rows = {"GPU": "none that torch sees", "driver": driver()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = properties.total_memory / 2**30
        rows["GPU"] = f"{properties.name}, {memory:.0f} GiB, compute capability {properties.major}.{properties.minor}"
    rows |= {"CUDA": torch.version.cuda or "torch is built without", "torch": torch.__version__}
    rows["transformers"] = versions()["transformers"]
    return rows | {f"attention {name}": reason or "yes" for name, reason in gpu_proofs.installed().items()}


def driver() -> str:
    """The GPU driver's version, as nvidia-smi says."""
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is not there"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.strip().split("\n")[0] or "nvidia-smi does not say"


def refused(dry: bool) -> Mapping[str, str]:
    """Print what was found; the stages that cannot run on it, and why."""
    for name, value in equipment().items():
        print(f"{name:>28}  {value}")
    cuda = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else None
    return reasons(dry, memory, [name for name in TESTED_WITH if find_spec(name) is None])


def reasons(dry: bool, memory: int | None, missing: list[str]) -> dict[str, str]:
    """Why stages cannot run with so many bytes on the GPU (None: no GPU), and without the packages that are missing."""
    why: dict[str, str] = {}
    if missing:
        why["laws"] = f'the test suite needs {", ".join(missing)}; pip install -e ".[dev]"'
    if dry:
        return why
    if memory is None:
        return dict.fromkeys(STAGES, "torch sees no CUDA device")
    for stage, name in WEIGHTS.items():
        needed = weight_bytes(GEOMETRIES[name])
        if needed > 0.9 * memory:
            why[stage] = f"the weights of {name} take {needed / 2**30:.0f} GiB, the GPU has {memory / 2**30:.0f} GiB"
    return why


def weight_bytes(geometry: Geometry) -> int:
    """A decoder's weights in bfloat16, embeddings and lm_head included."""
    attention = 2 * geometry.hidden * geometry.head_dim * (geometry.heads + geometry.kv_heads)
    layer = attention + 3 * geometry.hidden * geometry.intermediate
    return 2 * (geometry.layers * layer + 2 * geometry.vocab * geometry.hidden)


if __name__ == "__main__":
    stages.main("gpu", STAGES, __doc__ or "", refused)
