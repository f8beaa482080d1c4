"""A one-shot look into one attention layer: its post-rotary q and k, whatever kernel the model runs.

Attention modules look their kernel up by the name in ``self.config._attn_implementation``. For one call, and for the
thread that asked, that name is ours; the registered function shows the layer's inputs to the caller and hands over to
the model's own kernel. Masks are still built for the real kernel, because the model's config is not touched.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "vlmflow_probe"


@dataclass(frozen=True)
class Seen:
    """What a kernel is called with: q (batch, heads, query, channel), k and v with their own heads and keys."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float | None
    softcap: float | None


Watcher = Callable[[Seen], None]


class _WatchedConfig:
    """Stands in for an attention module's config while some thread watches its next call."""

    def __init__(self, real: PreTrainedConfig):
        self.real = real
        self.watchers: dict[int, Watcher] = {}

    @property
    def _attn_implementation(self) -> str | None:
        return NAME if threading.get_ident() in self.watchers else self.real._attn_implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


_lock = threading.Lock()


def watch(attention: nn.Module, watcher: Watcher) -> None:
    """Show the next call of an attention module, made by this thread, to ``watcher`` before its kernel runs."""
    with _lock:
        if not isinstance(attention.config, _WatchedConfig):
            attention.config = _WatchedConfig(attention.config)
        attention.config.watchers[threading.get_ident()] = watcher


def unwatch(attention: nn.Module) -> Watcher | None:
    """Take this thread's watcher back, and the stand-in with the last one. Returns None if the call has been seen."""
    with _lock:
        config = attention.config
        if not isinstance(config, _WatchedConfig):
            return None
        watcher = config.watchers.pop(threading.get_ident(), None)
        if not config.watchers:
            attention.config = config.real
        return watcher


def _probe(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    watcher = unwatch(module)
    if watcher is not None:
        watcher(Seen(query, key, value, attention_mask, kwargs.get("scaling"), kwargs.get("softcap")))
    implementation = module.config._attn_implementation
    if implementation in (None, "eager"):  # each modeling file has its own
        kernel = sys.modules[type(module).__module__].eager_attention_forward
    else:
        kernel = ALL_ATTENTION_FUNCTIONS[implementation]
    return kernel(module, query, key, value, attention_mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(NAME, _probe)
