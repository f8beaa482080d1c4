"""What a checkpoint says of itself in its settings files: which code of its own it would have transformers run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from vlmflow.records.files import read_json

SETTINGS = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def needs_own_code(path: str) -> str:
    """Why a checkpoint is refused that transformers knows only by code in it; names the files."""
    files = ", ".join(sorted(set(_code_files(path)))) or "none is named"
    return (
        f"it needs code of its own ({files}), and code of a checkpoint is never run; take a version of it for "
        "transformers (many have -hf in their name)"
    )


def settings_of(path: str) -> Iterator[dict[str, Any]]:
    """The settings files that a hub id or local folder has, as far as they can be read.

    Raises:
        RecordError: one is broken.
    """
    for name in SETTINGS:
        file = cached_file(
            path,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if file is not None:
            yield read_json(Path(file))


def _code_files(path: str) -> Iterator[str]:
    for settings in settings_of(path):
        for reference in chain.from_iterable(map(_class_names, settings.get("auto_map", {}).values())):
            yield reference.rpartition(".")[0].replace("--", "/") + ".py"


def _class_names(entry: Any) -> list[str]:
    """The names in one entry of ``auto_map``: one, or a list or table of some that may be null."""
    if isinstance(entry, str):
        return [entry]
    inside = entry.values() if isinstance(entry, dict) else entry or ()
    return [name for name in inside if isinstance(name, str)]
