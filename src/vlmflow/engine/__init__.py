"""The one room that reaches into transformers' insides: hooks, probe, pruned KV cache."""

from vlmflow.engine.backends import set_aside_broken_torchvision

set_aside_broken_torchvision()  # without this, importing what follows would fail

from vlmflow.engine.session import Session, attach, prune  # noqa: E402
from vlmflow.engine.tap import Tap, TappedCall  # noqa: E402
from vlmflow.engine.trace import Trace  # noqa: E402

__all__ = ["Session", "Tap", "TappedCall", "Trace", "attach", "prune"]
