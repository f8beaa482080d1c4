"""The one room that reaches into transformers' insides: hooks, probe, pruned KV cache."""

from vlmflow.engine.session import Session, attach, prune
from vlmflow.engine.tap import Tap, TappedCall
from vlmflow.engine.trace import Trace

__all__ = ["Session", "Tap", "TappedCall", "Trace", "attach", "prune"]
