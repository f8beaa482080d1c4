"""Load a checkpoint's processor, for images alone where its video half lacks a package."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from transformers.utils import import_utils
from transformers.utils.hub import PushToHubMixin, cached_file

from vlmflow.core.errors import one_line, typed_line
from vlmflow.engine.backends import set_aside_broken_torchvision
from vlmflow.records.files import read_json

if TYPE_CHECKING:  # at run time it is imported once a broken torchvision is out of its way
    from transformers import ProcessorMixin

SETTINGS = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
QWEN_VL = "qwen"  # the model_type of what ``vlmflow.models.qwen_vl`` reads
EXTRAS = {  # package -> the extra of ours that brings it
    "torchvision": "video",
    "num2words": "video",
    "sentencepiece": "tokenizers",
    "tiktoken": "tokenizers",
    "protobuf": "tokenizers",
}


class ProcessorError(ValueError):
    """A processor cannot be loaded or used; the message says what to do."""


def load_processor(path: str, revision: str | None = None) -> ProcessorMixin:
    """Load the processor of a hub id or local folder; no code of the checkpoint's own is run.

    Most families' processors also take videos, and want torchvision and other packages that only videos need. Where
    one is missing or broken, the processor is put together from its tokenizer and its image processor: it refuses
    videos, and a line on stderr says what they would need, once in a process.

    Raises:
        ProcessorError: there is none for images, or none but in code of the checkpoint's own; it lacks a package that
            images need; its tokenizer is missing.
        OSError: it cannot be found.
    """
    flaw = set_aside_broken_torchvision()
    videos_need = f"install a torchvision that fits this torch ({flaw})" if flaw else 'pip install "vlmflow[video]"'
    at = {"revision": revision or "main"}
    try:
        processor = _published_qwen_vl(path, at) or _of_transformers(path, at, videos_need)
    except ProcessorError:
        raise
    except (ImportError, ValueError) as error:
        raise ProcessorError(_reason(error)) from error
    ids = processor.tokenizer.encode("a", add_special_tokens=False)
    if set(ids) <= set(processor.tokenizer.all_special_ids):  # transformers makes an empty one of no file at all
        raise ProcessorError("its tokenizer knows no text: tokenizer.json is missing; get the whole checkpoint")
    _check_template(processor)
    return processor


def _published_qwen_vl(path: str, at: Mapping[str, Any]) -> Any | None:
    """Qwen-VL's, which was published as code; None for other models, and where one was saved with it."""
    settings = list(_settings(path, at))
    found = next((one for one in settings if one.get("model_type") == QWEN_VL and "visual" in one), None)
    if found is None or any("processor_class" in one for one in settings):
        return None
    from vlmflow.models.qwen_vl import published_processor

    return published_processor(path, found, at)


def _of_transformers(path: str, at: Mapping[str, Any], videos_need: str) -> Any:
    kind = _processor_class(path, at)
    if not {"tokenizer", "image_processor"} <= set(kind.get_attributes()):
        raise ProcessorError(f"its {kind.__name__} takes no images with text, so it is no image-text-to-text model")
    return _with_videos(kind, path, at) or _for_images(kind, path, at, videos_need)


def _check_template(processor: Any) -> None:
    """Refuse a chat template that cannot put a question about an image."""
    if not processor.chat_template:
        return
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    try:
        processor.apply_chat_template(question, add_generation_prompt=True)
    except Exception as error:  # jinja's own errors, and whatever the template's code runs into
        raise ProcessorError(f"its chat template is broken ({typed_line(error)}); get the checkpoint again") from error


def _processor_class(path: str, at: Mapping[str, Any]) -> Any:
    """The class that the checkpoint's files name, else that of its model type."""
    import transformers
    from transformers.models.auto.processing_auto import (
        PROCESSOR_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage] (5.23 defines it elsewhere than 5.0)
    )

    name = next((kind for settings in _settings(path, at) if (kind := settings.get("processor_class"))), None)
    if name is None:
        config = transformers.AutoConfig.from_pretrained(path, **at, trust_remote_code=False)
        name = PROCESSOR_MAPPING_NAMES.get(config.model_type)
    if name is None:
        raise ProcessorError("it has no processor for images, so it is no image-text-to-text model")
    try:
        # a class that is said to need torchvision comes as a placeholder, which knows where the class itself is
        return getattr(_module(getattr(transformers, name).__module__), name)
    except ImportError as error:
        raise ProcessorError(_reason(error)) from error
    except AttributeError as error:
        raise ProcessorError(
            f"its {name} is not in transformers {transformers.__version__}; {needs_own_code(path, at)}"
        ) from error


def _module(name: str) -> Any:
    """A processor's module; one that takes a function from its image processor's may take it from the Pillow twin."""
    try:
        return importlib.import_module(name)
    except ImportError:
        folder, _, family = name.rpartition(".processing_")
        if find_spec(twin := f"{folder}.image_processing_pil_{family}") is None:
            raise
        wanted = f"{folder}.image_processing_{family}"
        sys.modules[wanted] = importlib.import_module(twin)
        try:
            return importlib.import_module(name)
        finally:
            del sys.modules[wanted]


def _with_videos(kind: Any, path: str, at: Mapping[str, Any]) -> Any | None:
    """The processor as it is, None if its video half lacks a package."""
    takes_videos = "video_processor" in kind.get_attributes()
    if takes_videos and not import_utils.is_torchvision_available():
        return None
    try:
        return kind.from_pretrained(path, **at, trust_remote_code=False)
    except ImportError:
        if takes_videos:
            return None
        raise


def _for_images(kind: Any, path: str, at: Mapping[str, Any], videos_need: str) -> Any:
    """A processor that refuses videos."""
    from transformers.processing_utils import MODALITY_TO_AUTOPROCESSOR_MAPPING

    settings, _ = kind.get_processor_dict(path, **at)
    names = kind.get_attributes()
    if not set(names) <= MODALITY_TO_AUTOPROCESSOR_MAPPING.keys():
        raise ProcessorError(f"its {kind.__name__} cannot be loaded for images only; for videos: {videos_need}")
    parts = [
        NoVideos(videos_need)
        if name == "video_processor"
        else MODALITY_TO_AUTOPROCESSOR_MAPPING[name].from_pretrained(path, **at, trust_remote_code=False)
        for name in names
    ]
    with _excused(kind):
        processor = _lenient(kind).from_args_and_dict(parts, settings)
    _note(videos_need)
    return processor


def needs_own_code(path: str, at: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Why a checkpoint is refused that transformers knows only by code in it; names the files."""
    maps = [settings.get("auto_map") for settings in _settings(path, at)]
    entries = [entry for named in maps if isinstance(named, dict) for entry in named.values()]
    classes = [name for entry in entries for name in _strings(entry)]
    files = sorted({name.rpartition(".")[0].replace("--", "/") + ".py" for name in classes})
    return (
        f"it needs code of its own ({', '.join(files) or 'none is named'}), and code of a checkpoint is never run; "
        "take a version of it for transformers (many have -hf in their name)"
    )


def _strings(entry: Any) -> list[str]:
    """The texts of a text, or of a list or table of texts and nulls."""
    inside = entry.values() if isinstance(entry, dict) else [entry] if isinstance(entry, str) else entry or ()
    return [text for text in inside if isinstance(text, str)]


def _settings(path: str, at: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings files that a hub id or local folder has, as far as they can be read."""
    kinds = ("gated_repo", "missing_entries", "connection_errors")
    lenient: dict[str, Any] = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
    for name in SETTINGS:
        if (file := cached_file(path, name, **at, **lenient)) is not None:
            yield read_json(Path(file))


class NoVideos(PushToHubMixin):  # which transformers takes as the sign that a part can be written with its processor
    """What stands in for the video half of a processor, and refuses to be used."""

    num_frames = fps = None  # SmolVLM takes them along with every prompt

    def __init__(self, videos_need: str) -> None:
        self.videos_need = videos_need
        self.model_input_names: list[str] = []

    def __call__(self, videos: Any, **_: Any) -> Any:
        """Refuse."""
        raise ProcessorError(f"this processor was loaded for images only; for videos: {self.videos_need}")

    def to_dict(self) -> dict[str, Any]:
        """Nothing that could be loaded again."""
        return {}


def _lenient(kind: Any) -> Any:
    """The class under the same name, less its check that the video half has a type which only torchvision brings."""

    def check(self: Any, name: str, part: Any) -> Any:
        return type(part) if isinstance(part, NoVideos) else kind.check_argument_for_proper_class(self, name, part)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})


@contextmanager
def _excused(kind: Any) -> Iterator[None]:
    """Let a class be built that insists on a package for its videos, as SmolVLM's does on num2words.

    Such a package, where it is not installed, is None in the class's module.
    """
    module = sys.modules[kind.__module__]
    absent = [name for name, value in vars(module).items() if value is None and not name.startswith("_")]
    for name in absent:
        setattr(module, name, ProcessorError)
    try:
        yield
    finally:
        for name in absent:
            setattr(module, name, None)


@cache
def _note(videos_need: str) -> None:
    """Say once on stderr that videos are left out."""
    logging.getLogger(__name__).warning("vlmflow: loaded for images only; for videos: %s", videos_need)


def _reason(error: BaseException) -> str:
    """One line; a package that is not installed is named with the extra that brings it."""
    text, cause = "", error
    while cause is not None:
        text, cause = f"{text} {cause}".lower(), cause.__cause__ or cause.__context__
    if "unrecognized image processor" in text and not import_utils.is_torchvision_available():
        # so it is with Idefics3 in transformers 5.12, which does not say why
        return 'transformers finds no image processor for it; some need torchvision: pip install "vlmflow[video]"'
    for package, extra in EXTRAS.items():
        if package in text:
            return f'it needs {package}: pip install "vlmflow[{extra}]"'
    return one_line(error)
