"""Time measured side by side: what pruning saves on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlmflow.engine import attach
from vlmflow.pruners import Pruner


def prefill_seconds(
    model: nn.Module, inputs: dict[str, Tensor], pruners: Sequence[Pruner], repeats: int
) -> list[float]:
    """Median time of a prefill under each pruner, in seconds, the runs interleaved so that drifts hit all alike."""
    times: list[list[float]] = [[] for _ in pruners]
    for round_ in range(repeats + 1):
        for pruner, taken in zip(pruners, times, strict=True):
            with attach(model, pruner), torch.inference_mode():
                start = time.perf_counter()
                model(**inputs, use_cache=True, logits_to_keep=1)
                _synchronize(inputs)
            if round_:  # the first round warms up
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def _synchronize(inputs: dict[str, Tensor]) -> None:
    if inputs["input_ids"].is_cuda:
        torch.cuda.synchronize()
