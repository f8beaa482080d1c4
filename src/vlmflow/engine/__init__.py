"""The one room that reaches into transformers' insides: hooks, probe, pruned KV cache."""

from vlmflow.engine.backends import set_aside_broken_torchvision

set_aside_broken_torchvision()  # without this, importing what follows would fail

from vlmflow.engine.prompt import answer_starts  # noqa: E402
from vlmflow.engine.session import Session, attach, detach, prune  # noqa: E402
from vlmflow.engine.tap import Tap, TappedCall  # noqa: E402
from vlmflow.engine.trace import Trace  # noqa: E402

__all__ = ["Session", "Tap", "TappedCall", "Trace", "answer_starts", "attach", "detach", "prune"]
