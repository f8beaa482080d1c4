"""A one-shot look into one attention layer: its post-rotary q and k, whatever kernel the model runs.

Attention modules look their kernel up by the name in ``self.config._attn_implementation``: in transformers' table, or,
for eager attention, among the functions of their modeling file. While some thread watches a module's next call, that
entry is ours. It hands the watched call to those who watch, and they to the model's own kernel; all other calls go
straight on. The name itself is not touched: masks are built by it, and modules branch on it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmflow.core.attention import Scoring

Kernel = Callable[..., tuple[Tensor, Any]]

_SCORING = {"scaling", "softcap", "position_bias", "s_aux"}  # keyword arguments that make attention what it is
_NO_SCORING = {  # those that do not, that the mask says as well, or that the models around hand down
    *("dropout", "is_causal", "sliding_window", "position_ids", "cache_position", "position_embeddings", "layer_idx"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch"),
    *("logits_to_keep", "image_sizes", "image_grid_thw", "video_grid_thw", "mm_token_type_ids", "token_type_ids"),
}


@dataclass(frozen=True)
class KernelCall:
    """One call of an attention kernel.

    ``query`` is (batch, heads, query, channel), ``key`` and ``value`` (batch, kv_heads, key, channel), post-rotary;
    ``options`` are the kernel's keyword arguments. ``run()`` goes on to the kernel and gives what it returns: the
    output (batch, query, heads, channel), and None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: Mapping[str, Any]
    run: Callable[[], tuple[Tensor, Any]]

    @property
    def scoring(self) -> Scoring:
        """How the kernel makes attention of q and k.

        Raises:
            ValueError: an option that may change it, and is not known.
        """
        for name, value in self.options.items():
            if name not in _SCORING and name not in _NO_SCORING and isinstance(value, Tensor | float):
                raise ValueError(
                    f"vlmflow: the attention kernel is given {name!r}, which may change what tokens attend to in a way "
                    "that the ranking does not know; this model cannot be pruned or watched"
                )
        bias, sinks = self.options.get("position_bias"), self.options.get("s_aux")
        return Scoring(self.options.get("scaling"), self.options.get("softcap"), bias, sinks)


Watcher = Callable[[KernelCall], tuple[Tensor, Any]]


@dataclass
class _Loan:
    """An entry of a table of kernels that is ours for as long as ``users`` wait for a call."""

    table: MutableMapping[str, Any]
    name: str
    kernel: Kernel
    users: int = 0

    def begin(self) -> None:
        """Put our function where the kernel was."""
        self.table[self.name] = _probe

    def end(self) -> None:
        """Put the kernel back; an entry of transformers' table that only hid the library's own just goes."""
        if self.table is ALL_ATTENTION_FUNCTIONS:
            del self.table[self.name]
        if self.table.get(self.name) is not self.kernel:
            self.table[self.name] = self.kernel


_lock = threading.Lock()
_loans: dict[tuple[int, str], _Loan] = {}  # by the table's id and the name in it
_watchers: WeakKeyDictionary[nn.Module, dict[int, list[Watcher]]] = WeakKeyDictionary()  # by thread


def watch(attention: nn.Module, watcher: Watcher) -> None:
    """Hand the next call of an attention module, made by this thread, to ``watcher``, before any that watch already."""
    with _lock:
        waiting = _watchers.setdefault(attention, {}).setdefault(threading.get_ident(), [])
        if not waiting:
            table, name = _entry(attention)
            loan = _loans.setdefault((id(table), name), _Loan(table, name, table[name]))
            if not loan.users:
                loan.begin()
            loan.users += 1
        waiting.insert(0, watcher)


def unwatch(attention: nn.Module) -> list[Watcher]:
    """Take this thread's watchers back; none are left once the call was made."""
    with _lock:
        return _forget(attention, threading.get_ident())


def unwatch_everywhere(attention: nn.Module) -> None:
    """Take the watchers of all threads back: some may have been interrupted before their call."""
    with _lock:
        for thread in list(_watchers.get(attention, {})):
            _forget(attention, thread)


def _forget(attention: nn.Module, thread: int) -> list[Watcher]:
    waiting = _watchers.get(attention, {}).pop(thread, [])
    if waiting:
        table, name = _entry(attention)
        loan = _loans[id(table), name]
        loan.users -= 1
        if not loan.users:
            loan.end()
            del _loans[id(table), name]
    return waiting


def _entry(attention: Any) -> tuple[MutableMapping[str, Any], str]:
    """Where an attention module finds its kernel."""
    name = attention.config._attn_implementation
    if name is not None and name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS, name
    return inspect.unwrap(type(attention).forward).__globals__, "eager_attention_forward"


def _probe(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **options: Any
) -> tuple[Tensor, Any]:
    table, name = _entry(module)
    loan = _loans.get((id(table), name))  # none if the last of other threads' calls has just been made
    kernel = table[name] if loan is None else loan.kernel
    run = partial(kernel, module, query, key, value, attention_mask, *args, **options)
    for watcher in reversed(unwatch(module)):  # nothing here refers to itself, so that q, k and v go with the call
        run = partial(watcher, KernelCall(query, key, value, attention_mask, options, run))
    return run()
