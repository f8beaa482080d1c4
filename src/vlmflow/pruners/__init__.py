"""Pruning methods: each one small frozen dataclass that says where to look and how many image tokens stay."""

from typing import TYPE_CHECKING, Any

from vlmflow.pruners.controls import Random, Uniform, Unpruned
from vlmflow.pruners.fastv import FastV
from vlmflow.pruners.himap import HiMAP
from vlmflow.pruners.method import Pruner, Queries, Stage, Task, check_layer, check_order, check_share, kept_after
from vlmflow.pruners.pyramiddrop import PyramidDrop
from vlmflow.pruners.table import PRUNERS, PUBLISHED, find_pruner, find_pruners, make_pruner, parse_fields
from vlmflow.pruners.vtw import VTW

if TYPE_CHECKING:
    from vlmflow.pruners.view import View

__all__ = [
    "PRUNERS",
    "PUBLISHED",
    "VTW",
    "FastV",
    "HiMAP",
    "Pruner",
    "PyramidDrop",
    "Queries",
    "Random",
    "Stage",
    "Task",
    "Uniform",
    "Unpruned",
    "View",
    "check_layer",
    "check_order",
    "check_share",
    "find_pruner",
    "find_pruners",
    "kept_after",
    "make_pruner",
    "parse_fields",
]


def __getattr__(name: str) -> Any:
    """``View`` alone needs torch, whose seconds names, schedules and costs shall not wait for."""
    if name != "View":
        raise AttributeError(f"module 'vlmflow.pruners' has no attribute {name!r}")
    from vlmflow.pruners.view import View

    return View
