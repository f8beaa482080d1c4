"""The methods by name, and their fields from text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, get_type_hints

from vlmflow.pruners.controls import Random, Uniform, Unpruned
from vlmflow.pruners.fastv import FastV
from vlmflow.pruners.himap import HiMAP
from vlmflow.pruners.method import Pruner
from vlmflow.pruners.outside import check_pruner, installed_pruners, load_installed, load_pruner
from vlmflow.pruners.pyramiddrop import PyramidDrop
from vlmflow.pruners.vtw import VTW

PUBLISHED: tuple[type[Pruner], ...] = (HiMAP, FastV, VTW, PyramidDrop)
PRUNERS: dict[str, type[Pruner]] = {method.name: method for method in (Unpruned, *PUBLISHED, Random, Uniform)}


def find_pruner(method: str | type[Pruner]) -> type[Pruner]:
    """The class that is meant by a name, by ``path/to/file.py:Class``, by ``module:Class``, or by itself.

    Names are those of ``PRUNERS`` and those that installed packages give their entry points ``vlmflow.pruners``.

    Raises:
        ValueError: there is none, or it is no pruning method.
    """
    if not isinstance(method, str):
        return check_pruner(method, method.__name__)
    if method in PRUNERS:
        return PRUNERS[method]
    if ":" in method:
        return load_pruner(method)
    if method in (installed := installed_pruners()):
        return load_installed(method)
    raise ValueError(
        f"unknown pruner {method!r}; choose from {', '.join([*PRUNERS, *installed])}, or name a class of your own: "
        "file.py:Class, module:Class"
    )


def find_pruners(methods: Iterable[str | type[Pruner]]) -> list[type[Pruner]]:
    """The classes of several methods, each once.

    Raises:
        ValueError: one is none, or two go by one name.
    """
    found: dict[str, type[Pruner]] = {}
    for method in map(find_pruner, methods):
        if found.setdefault(method.name, method) is not method:
            raise ValueError(f"two methods are called {method.name}; give one of the classes another name")
    return list(found.values())


def make_pruner(
    method: str | type[Pruner], settings: Mapping[str, str], n_layers: int, attends: Sequence[bool] = ()
) -> Pruner:
    """A method's published defaults scaled to the depth, with fields set from text (``0.5``, ``2,4``).

    ``attends`` says which layers do, where some are recurrent.

    >>> make_pruner("fastv", {"ratio": "0.75"}, n_layers=32)
    FastV(k=2, ratio=0.75)

    Raises:
        ValueError: unknown method or field, or a value that the field does not take.
    """
    values = parse_fields(method, settings)
    scaled = find_pruner(method).scaled(n_layers)
    return replace(scaled.fitted(attends) if attends else scaled, **values)


def parse_fields(method: str | type[Pruner], settings: Mapping[str, str]) -> dict[str, Any]:
    """The values that a method's fields are set to by text.

    Raises:
        ValueError: unknown method or field, or text that is no value of the field's type.
    """
    found = find_pruner(method)
    names = [field.name for field in fields(found) if field.init]
    for field in settings:
        if field not in names:
            takes = f"its fields are {', '.join(names)}" if names else "it has no fields"
            raise ValueError(f"pruner {found.name} has no field {field!r}; {takes}")
    kinds = get_type_hints(found) if settings else {}
    return {field: _parse(found.name, field, kinds[field], text) for field, text in settings.items()}


def _parse(name: str, field: str, kind: Any, text: str) -> Any:
    if kind not in _READERS:
        raise ValueError(f"pruner {name}: {field} is of a type that no text sets; change its default")
    wanted, read = _READERS[kind]
    try:
        return read(text)
    except ValueError:
        raise ValueError(f"pruner {name}: {field} must be {wanted}, got {text!r:.80}") from None


def _flag(text: str) -> bool:
    return bool(["false", "true"].index(text.lower()))


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


_READERS: dict[Any, tuple[str, Callable[[str], Any]]] = {  # by a field's type: what text it takes, how that is read
    int: ("a whole number", int),
    float: ("a number", float),
    bool: ("true or false", _flag),
    str: ("text", str),
    tuple[int, ...]: ("whole numbers with commas between", _whole_numbers),
}
