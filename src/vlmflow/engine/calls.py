"""Which calls of a model are running, thread by thread.

A call may be nested in another, where a hook calls the model again. And it may end without a word: torch runs its hooks
after an exception, but not after a KeyboardInterrupt. What tells is the frame in which the model runs. So it is with
``generate()``, of whose settings a model is told nothing.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from threading import get_ident
from types import FrameType
from typing import TYPE_CHECKING

from torch import nn
from transformers import GenerationMixin

if TYPE_CHECKING:
    from vlmflow.engine.prefill import Prefill
    from vlmflow.engine.prompt import Inputs

_CALL = nn.Module._call_impl.__code__
_GENERATE = inspect.unwrap(vars(GenerationMixin)["generate"]).__code__


@dataclass(frozen=True)
class Generation:
    """A ``generate()`` that is running."""

    length: int  # of the prompt, with what its cache holds already
    chunk_size: int | None  # tokens of the prompt that are read at once

    @classmethod
    def running(cls) -> Generation | None:
        """This thread's, the innermost."""
        frame = next((frame for frame in _frames() if frame.f_code is _GENERATE), None)
        if frame is None:
            return None
        given = frame.f_locals
        return cls(given["input_ids"].shape[1], given["generation_config"].prefill_chunk_size)


@dataclass
class Call:
    """A running call of a model around the text decoder.

    ``inputs`` are there until the text decoder takes them, then ``prefill`` until that ends; neither, where a call
    reads one token inside another call. ``frame`` is torch's, in which the model runs.
    """

    frame: FrameType | None
    model: nn.Module
    inputs: Inputs | None
    prefill: Prefill | None = None


class Calls(dict[int, list[Call]]):
    """The running calls by thread, the innermost last. Empty it does not ask for the thread, so that it compiles."""

    def innermost(self) -> Call | None:
        """This thread's innermost call."""
        running = self.get(get_ident()) if self else None
        return running[-1] if running else None

    def prefill(self) -> Prefill | None:
        """The prefill that this thread's innermost call is in."""
        call = self.innermost()
        return None if call is None else call.prefill

    def begin(self, model: nn.Module, inputs: Inputs | None) -> None:
        """Note a call of this thread, from a hook that runs before the model's forward."""
        frame = next((frame for frame in _frames() if frame.f_code is _CALL), None)
        self.setdefault(get_ident(), []).append(Call(frame, model, inputs))

    def end(self, model: nn.Module) -> Call | None:
        """Forget this thread's innermost call, if it is one of ``model``, and give it."""
        call = self.innermost()
        if call is None or call.model is not model:
            return None
        self._forget_last()
        return call

    def forget_interrupted(self) -> bool:
        """Forget this thread's calls that run no longer; whether there were any."""
        running = {frame for frame in _frames() if frame.f_code is _CALL}
        found = False
        while (call := self.innermost()) is not None and call.frame is not None and call.frame not in running:
            self._forget_last()
            found = True
        return found

    def _forget_last(self) -> None:
        running = self[get_ident()]
        running.pop()
        if not running:
            del self[get_ident()]


def _frames() -> Iterator[FrameType]:
    """What this thread is running, from here outwards."""
    frame = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back
