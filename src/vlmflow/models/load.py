"""Load a model whole or not at all: no code of a checkpoint runs, no weight is drawn at random."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from rich.filesize import decimal
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig
from transformers.utils import logging

from vlmflow.core.errors import one_line, typed_line
from vlmflow.core.geometry import GEOMETRIES, Geometry
from vlmflow.core.hub import HubError, UnreachableError, ask
from vlmflow.models.processors import QWEN_VL, load_processor, needs_own_code
from vlmflow.models.vlm import VLM, ModelError, attending_layers
from vlmflow.pico import MODEL_DIR

MOST_LAYERS = 1000  # no model is so deep
MOST_WEIGHTS_A_BYTE = 8  # of a checkpoint's files; no way of packing weights comes near
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class ModelWarning(UserWarning):
    """A model was loaded, but something about its checkpoint should be known."""


def load(
    name: str = "pico",
    device: str | None = None,
    dtype: str = "auto",
    attn: str = "sdpa",
    revision: str | None = None,
) -> VLM:
    """Load a model by hub id, local folder, or ``pico``, the model inside the package.

    ``dtype`` is a torch dtype's name, or ``auto`` for the checkpoint's own (float32 for pico). ``device`` is where it
    goes, by default the first accelerator, else the CPU; ``auto`` spreads its layers over all accelerators and, what
    they cannot hold, over the CPU's memory, as accelerate sees fit. ``revision`` is a branch, tag or commit on the hub.

    >>> load("pico").n_layers
    10

    Raises:
        ModelError: it cannot be found, has no weights or broken ones, is no image-text-to-text model, or cannot go to
            the device.
    """
    path = _path(name, revision)
    if name == "pico" and dtype == "auto":
        dtype = "float32"  # half precision on disk only
    if dtype != "auto":
        dtype_named(dtype)
    where = "auto" if device == "auto" else device_named(device)
    logging.disable_progress_bar()
    try:
        config = _read_config(path, revision)
        processor = load_processor(path, revision)
        _check_size(path, config)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            revision=revision or "main",
            dtype=dtype,
            attn_implementation=attn,
            device_map="auto" if where == "auto" else None,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
        model, report = loaded
    except Exception as error:  # a broken checkpoint makes its readers raise whatever they run into
        raise ModelError(f"cannot load {name!r}: {_reason(name, error)}") from error
    _check_complete(name, report)
    if where != "auto":
        try:
            nn.Module.to(model, where)
        except RuntimeError as error:  # it is too large, for one
            raise ModelError(f"cannot put {name!r} on device {where!r}: {one_line(error)}") from error
    _check_finite(name, model)
    if model.config.model_type == QWEN_VL:
        from vlmflow.models.qwen_vl import answer_settings

        model.generation_config = answer_settings(processor.tokenizer)
    return VLM(name, model.eval(), processor)


def convert(name: str, folder: Path, revision: str | None = None) -> int:
    """Write a published Qwen-VL into a folder as safetensors; returns the number of its shards.

    Raises:
        ModelError: it cannot be found or read, or is another model, which needs no conversion.
    """
    path = _path(name, revision)
    try:
        if _read_config(path, revision).model_type != QWEN_VL:
            raise ModelError("only Qwen-VL and Qwen-VL-Chat of 2023 need to be converted; use it as it is")
        from vlmflow.models import qwen_vl

        processor = load_processor(path, revision)
        if not Path(path).is_dir():
            path = snapshot_download(path, revision=revision, allow_patterns=["config.json", "*.bin"])
        return qwen_vl.convert(Path(path), processor, folder)
    except Exception as error:  # as in ``load``
        raise ModelError(f"cannot convert {name!r}: {_reason(name, error)}") from error


def _path(name: str, revision: str | None) -> str:
    """What transformers finds a model by: its folder, or its hub id where the hub answers.

    Where it does not, the folder of what was downloaded before.

    Raises:
        ModelError: no such folder, no such model on the hub, or a hub that does not answer and nothing downloaded.
    """
    if name == "pico" or Path(name).is_dir():
        if revision is not None:
            raise ModelError(f"{name!r} is no model of the hub, so it has no revision {revision!r}; leave it out")
        return str(MODEL_DIR) if name == "pico" else name
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ModelError(f"cannot load {name!r}: there is no such folder, and this is no hub id") from None
    if constants.HF_HUB_OFFLINE:
        return name
    try:
        ask("model", name, revision)
    except UnreachableError as error:
        try:
            return snapshot_download(name, revision=revision, local_files_only=True)
        except LocalEntryNotFoundError:
            raise ModelError(
                f"cannot load {name!r}: there is no such folder, and {error}; check the name, or download it first"
            ) from error
    except HubError as error:
        raise ModelError(f"cannot load {name!r}: there is no such folder, and {error}") from error
    return name


def _check_complete(name: str, report: Mapping[str, Collection[Any]]) -> None:
    """Refuse a checkpoint that does not fill the model: transformers draws at random what is not in it.

    ``report`` is transformers' loading info, whose missing tensors are those that are not tied to others.
    """
    missing, unused = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    shapes = [(key, "x".join(map(str, got)), "x".join(map(str, want))) for key, got, want in report["mismatched_keys"]]
    wrong = [f"{key} is {got}, not {wanted}" for key, got, wanted in sorted(shapes)]
    if wrong:
        raise ModelError(f"cannot load {name!r}: {_counted(wrong)} of a wrong shape; get the checkpoint again")
    if missing:
        instead = f", and holds {_counted(unused)} that the model does not know" if unused else ""
        raise ModelError(f"cannot load {name!r}: its checkpoint lacks {_counted(missing)}{instead}; get it complete")
    if unused:
        warnings.warn(
            f"{name}: the model does not use {_counted(unused)} of the checkpoint", ModelWarning, stacklevel=3
        )


def _check_finite(name: str, model: nn.Module) -> None:
    weights = [(key, weight) for key, weight in model.named_parameters() if not weight.is_meta and weight.numel()]
    broken = [
        key
        for key, weight in weights
        if weight.dtype in _FLOATS and not all(math.isfinite(bound) for bound in torch.aminmax(_plain(weight)))
    ]
    if broken:
        raise ModelError(
            f"cannot load {name!r}: {_counted(broken)} with values that are not finite (nan or inf); "
            "get the checkpoint again, or load it in a wider dtype"
        )


def _plain(weight: nn.Parameter) -> torch.Tensor:
    """The numbers of a weight; torchao's quantised ones, which pass for floats, know no minimum of their own."""
    return weight.detach() if type(weight) is nn.Parameter else weight.detach().dequantize()


def _counted(names: Sequence[str]) -> str:
    """How many tensors, and the first three names."""
    rest = ", ..." if len(names) > 3 else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(names[:3])}{rest})"


def device_named(name: str | None) -> str:
    """A device that works here; by default the first accelerator, else the CPU.

    A ``ModelError`` where there is none of this name, or it holds no data, as torch's ``meta``.
    """
    accelerator = torch.accelerator.current_accelerator()
    device = name or ("cpu" if accelerator is None else accelerator.type)
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # a torch built without the device raises any
        raise ModelError(f"cannot use device {device!r}: {one_line(error)}") from error
    return device


def dtype_named(name: str) -> torch.dtype:
    """A torch dtype, or a ``ModelError`` where there is none of this name, or it holds whole numbers only."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"dtype must be auto or a torch dtype such as bfloat16 or float32, got {name!r}")
    return dtype


def read_attends(name: str, revision: str | None = None) -> tuple[bool, ...]:
    """Of each decoder layer of a model, whether it attends; from its config, before weights are loaded.

    Raises:
        ModelError: the config cannot be read.
    """
    path = _path(name, revision)
    try:
        return attending_layers(_read_config(path, revision))
    except Exception as error:  # as in ``load``
        raise ModelError(f"cannot load {name!r}: {_reason(name, error)}") from error


def config_commit(name: str, revision: str | None = None) -> str | None:
    """The hub's commit of a model's config, None where it comes from a folder; errors are as in ``load_geometry``."""
    return getattr(_read_config(_path(name, revision), revision), "_commit_hash", None)


def load_geometry(name: str, revision: str | None = None) -> Geometry:
    """What decides a model's cost, read from the config of a hub id, a local folder or ``pico``.

    Raises:
        ModelError: the config cannot be read.
        ValueError: a family that is not known.
    """
    path = _path(name, revision)
    try:
        config = _read_config(path, revision)
    except Exception as error:  # as in ``load``
        known = f"; built in are {', '.join(GEOMETRIES)}"
        raise ModelError(f"cannot read the config of {name!r}: {_reason(name, error)}{known}") from error
    return Geometry.from_config(config)


def _read_config(path: str, revision: str | None) -> Any:
    """A checkpoint's config; one whose depth no model has is refused: it would be built until all is full.

    Raises:
        ModelError: such a depth, or null for the text decoder, for which transformers takes one of 7 billion weights.
        Exception: whatever a broken config makes its readers run into.
    """
    written, _ = PreTrainedConfig.get_config_dict(path, revision=revision or "main")
    if written.get("model_type") == QWEN_VL:
        from vlmflow.models import qwen_vl  # lazily: it imports two more models of transformers

        qwen_vl.register()
    config = AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    if written.get("text_config", {}) is None:
        raise ModelError("text_config of its config is null, so nothing says what it is; get the checkpoint again")
    depth = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if depth is not None and not 0 < depth <= MOST_LAYERS:
        raise ModelError(f"its config names {depth!r:.20} decoder layers; get the checkpoint again")
    return config


def _check_size(path: str, config: Any) -> None:
    """Refuse a folder whose config is of a far larger model than its files: it would be made whole before it is missed.

    Raises:
        ModelError: with both sizes.
    """
    held = sum(file.stat().st_size for file in Path(path).glob("*") if file.suffix in (".safetensors", ".bin"))
    if not held:
        return
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in AutoModelForImageTextToText.from_config(config).parameters())
    if weights > MOST_WEIGHTS_A_BYTE * held:
        raise ModelError(
            f"its config makes {weights:,} weights, too many for files of {decimal(held)}; get the checkpoint again"
        )


def _reason(name: str, error: Exception) -> str:
    text, folder = str(error), Path(name)
    if "trust_remote_code" in text:
        return needs_own_code(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return "the folder has no weights (*.safetensors); point to a complete checkpoint"
    if isinstance(error, SafetensorError):
        return f"its weights are broken ({one_line(error)}); get them again"
    if "Unrecognized configuration class" in text:
        return "it is no image-text-to-text model; `vlmflow models` lists the families that work"
    if "Validation error" in text:  # the reason stands in the second line
        return f"its config is broken ({' '.join(text.split())}); get the checkpoint again"
    if not folder.exists() and ("connect" in text.lower() or "offline" in text.lower()):
        return "no such folder here, and the hub cannot be reached; check the name, or download the model first"
    if isinstance(error, OSError | ValueError | RuntimeError) and not isinstance(error, RecursionError):
        return one_line(error)
    return f"its files are broken ({typed_line(error)}); get the checkpoint again"
