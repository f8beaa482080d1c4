"""Models: loaded whole, prompted by their chat template, answering under a pruner."""

from vlmflow.core.images import ImageError, open_image
from vlmflow.models.ask import Run, ask
from vlmflow.models.grids import patch_grids, seen_images
from vlmflow.models.load import (
    ModelWarning,
    config_commit,
    convert,
    device_named,
    dtype_named,
    load,
    load_geometry,
    read_attends,
)
from vlmflow.models.tiles import seen_by
from vlmflow.models.vlm import VLM, Answer, ModelError, Question

__all__ = [
    "VLM",
    "Answer",
    "ImageError",
    "ModelError",
    "ModelWarning",
    "Question",
    "Run",
    "ask",
    "config_commit",
    "convert",
    "device_named",
    "dtype_named",
    "load",
    "load_geometry",
    "open_image",
    "patch_grids",
    "read_attends",
    "seen_by",
    "seen_images",
]
