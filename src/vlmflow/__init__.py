"""See where visual information flows in a multimodal LLM, and prune the image tokens it no longer needs."""

from vlmflow.engine import Session, Trace, attach, prune
from vlmflow.layout import Layout
from vlmflow.pruners import PRUNERS, VTW, FastV, HiMAP, Pruner, PyramidDrop, Random, Stage, Uniform, Unpruned, View

__version__ = "0.1.0"

__all__ = [
    "PRUNERS",
    "VTW",
    "FastV",
    "HiMAP",
    "Layout",
    "Pruner",
    "PyramidDrop",
    "Random",
    "Session",
    "Stage",
    "Trace",
    "Uniform",
    "Unpruned",
    "View",
    "attach",
    "prune",
]
