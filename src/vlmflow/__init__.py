"""See where visual information flows in a multimodal LLM, and prune the image tokens it no longer needs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmflow.core.layout import Layout
    from vlmflow.engine import Session, Trace, answer_starts, attach, detach, prune
    from vlmflow.flow.knockout import Knockout
    from vlmflow.flow.saliency import Saliency, saliency
    from vlmflow.flow.withdrawal import withdrawal
    from vlmflow.pruners import (
        PRUNERS,
        VTW,
        FastV,
        HiMAP,
        Pruner,
        PyramidDrop,
        Random,
        Stage,
        Uniform,
        Unpruned,
        View,
        make_pruner,
    )

__version__ = "0.1.0"

__all__ = [
    "PRUNERS",
    "VTW",
    "FastV",
    "HiMAP",
    "Knockout",
    "Layout",
    "Pruner",
    "PyramidDrop",
    "Random",
    "Saliency",
    "Session",
    "Stage",
    "Trace",
    "Uniform",
    "Unpruned",
    "View",
    "answer_starts",
    "attach",
    "detach",
    "make_pruner",
    "prune",
    "saliency",
    "withdrawal",
]

_ROOMS = {
    **dict.fromkeys(("Session", "Trace", "answer_starts", "attach", "detach", "prune"), "engine"),
    "Knockout": "flow.knockout",
    "Layout": "core.layout",
    **dict.fromkeys(("Saliency", "saliency"), "flow.saliency"),
    "withdrawal": "flow.withdrawal",
}


def __getattr__(name: str) -> Any:
    """Open a room when its name is first used: torch and transformers take seconds that ``--help`` does not need."""
    if name not in __all__:
        raise AttributeError(f"module 'vlmflow' has no attribute {name!r}")
    return getattr(import_module(f"vlmflow.{_ROOMS.get(name, 'pruners')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
