"""A one-shot look into one attention layer: its post-rotary q and k, whatever kernel the model runs.

Attention modules look their kernel up by the name in ``self.config._attn_implementation``. For one call, and for the
thread that asked, that name is ours; the registered function hands the call to those who watch, and they to the model's
own kernel. Masks are still built for the real kernel, because the model's config is not touched.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "vlmflow_probe"


@dataclass(frozen=True)
class KernelCall:
    """One call of an attention kernel.

    ``query`` is (batch, heads, query, channel), ``key`` and ``value`` (batch, kv_heads, key, channel), post-rotary.
    ``run()`` goes on to the kernel and gives what it returns: the output (batch, query, heads, channel), and None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float | None
    softcap: float | None
    run: Callable[[], tuple[Tensor, Any]]


Watcher = Callable[[KernelCall], tuple[Tensor, Any]]


class _WatchedConfig:
    """Stands in for an attention module's config while some thread watches its next call."""

    def __init__(self, real: PreTrainedConfig):
        self.real = real
        self.watchers: dict[int, list[Watcher]] = {}

    @property
    def _attn_implementation(self) -> str | None:
        return NAME if threading.get_ident() in self.watchers else self.real._attn_implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


_lock = threading.Lock()


def watch(attention: Any, watcher: Watcher) -> None:
    """Hand the next call of an attention module, made by this thread, to ``watcher``, before any that watch already."""
    with _lock:
        if not isinstance(attention.config, _WatchedConfig):
            attention.config = _WatchedConfig(attention.config)
        attention.config.watchers.setdefault(threading.get_ident(), []).insert(0, watcher)


def unwatch(attention: Any) -> list[Watcher]:
    """Take this thread's watchers back, and the stand-in with the last one; none are left once the call was made."""
    with _lock:
        config = attention.config
        if not isinstance(config, _WatchedConfig):
            return []
        watchers = config.watchers.pop(threading.get_ident(), [])
        if not config.watchers:
            attention.config = config.real
        return watchers


def _probe(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Any]:
    watchers = unwatch(module)
    implementation = module.config._attn_implementation
    if implementation in (None, "eager"):  # each modeling file has its own
        kernel = sys.modules[type(module).__module__].eager_attention_forward
    else:
        kernel = ALL_ATTENTION_FUNCTIONS[implementation]

    run = partial(kernel, module, query, key, value, attention_mask, **kwargs)
    scaling, softcap = kwargs.get("scaling"), kwargs.get("softcap")
    for watcher in reversed(watchers):  # nothing here refers to itself, so that q, k and v go with the call
        run = partial(watcher, KernelCall(query, key, value, attention_mask, scaling, softcap, run))
    return run()


ALL_ATTENTION_FUNCTIONS.register(NAME, _probe)
