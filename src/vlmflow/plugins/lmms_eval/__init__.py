"""vlmflow inside lmms-eval: its models and pruners under ``--model vlmflow``, the paper's tasks as task files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TASK_FILES = Path(__file__).parent / "tasks"


def manifests() -> list[Any]:
    """What the entry point ``lmms_eval.models`` offers; lmms-eval calls it wherever it starts, so it loads nothing."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return [ModelManifest(model_id="vlmflow", simple_class_path="vlmflow.plugins.lmms_eval.model.Vlmflow")]
