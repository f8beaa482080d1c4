"""Which calls of a model are running, thread by thread.

A call may be nested in another, where a hook calls the model again. And it may end without a word: torch runs its hooks
after an exception, but not after a KeyboardInterrupt. What tells is the frame in which the model runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from threading import get_ident
from types import FrameType

from torch import nn

from vlmflow.engine.prefill import Prefill
from vlmflow.engine.prompt import Prompt

_CALL = nn.Module._call_impl.__code__


@dataclass
class Call:
    """A running call of a model around the text decoder.

    ``prompt`` is there until the text decoder takes it, then ``prefill`` until that ends; neither, where a call reads
    one token inside another call. ``frame`` is torch's, in which the model runs.
    """

    frame: FrameType | None
    model: nn.Module
    prompt: Prompt | None
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

    def begin(self, model: nn.Module, prompt: Prompt | None) -> None:
        """Note a call of this thread, from a hook that runs before the model's forward."""
        frame = next((frame for frame in _frames() if frame.f_code is _CALL), None)
        self.setdefault(get_ident(), []).append(Call(frame, model, prompt))

    def end(self, model: nn.Module) -> None:
        """Forget this thread's innermost call, if it is one of ``model``."""
        call = self.innermost()
        if call is not None and call.model is model:
            self._forget_last()

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
