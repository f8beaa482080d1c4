"""Keep transformers from failing over a torchvision that does not fit torch."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.util import find_spec

from vlmflow.core.errors import typed_line


@cache
def set_aside_broken_torchvision() -> str | None:
    """Make a torchvision that cannot be imported pass for one that is not installed, and say what is wrong with it.

    transformers asks whether torchvision is there, not whether it can be imported, and then fails as a whole; so it
    does with PyPI's torchvision, which is built for CUDA, beside a torch for the CPU.
    """
    if find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # RuntimeError, OSError, ImportError, ...: it is up to what does not fit
        sys.modules["torchvision"] = None  # pyright: ignore[reportArgumentType] (Python's sign for "not to be had")
        from transformers.utils import import_utils

        import_utils.is_torchvision_available.cache_clear()  # it may have been asked before
        import_utils.is_torchvision_v2_available.cache_clear()
        return typed_line(error)
    return None
