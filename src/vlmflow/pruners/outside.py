"""Methods that stand outside the package: in a file, in a module, or offered by an installed package."""

from __future__ import annotations

import copyreg
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from vlmflow.pruners.method import Pruner, is_shipped

GROUP = "vlmflow.pruners"  # of entry points; their names are those of the classes


def load_pruner(spec: str) -> type[Pruner]:
    """The class that ``path/to/file.py:Class`` or ``module:Class`` means.

    Raises:
        ValueError: no such file, module or class, one that cannot be imported, or a class that is no method.
    """
    place, _, name = spec.rpartition(":")
    module = _run_file(Path(place)) if place.endswith(".py") else _import(place)
    if name not in vars(module):
        there = [own for own, cls in vars(module).items() if _is_pruner(cls) and cls.__module__ == module.__name__]
        has = f"its methods are {', '.join(there)}" if there else "it has no method"
        raise ValueError(f"{place} has no class {name!r}; {has}")
    found = check_pruner(vars(module)[name], spec)
    if found.__module__ == module.__name__ and place.endswith(".py"):
        copyreg.pickle(found, _reduce)
    return found


def installed_pruners() -> list[str]:
    """The names that installed packages offer."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def load_installed(name: str) -> type[Pruner]:
    """The class that an installed package offers under a name.

    Raises:
        ValueError: several packages offer it, it cannot be imported, is no method, or is called otherwise.
    """
    entries = entry_points(group=GROUP, name=name)
    if len(entries) > 1:
        raise ValueError(
            f"pruner {name}: offered by {', '.join(sorted(map(_package, entries)))}; uninstall all but one"
        )
    (entry,) = entries
    who = f"pruner {name} of package {_package(entry)}"
    try:
        found = entry.load()
    except Exception as error:  # whatever a stranger's module does
        raise ValueError(f"{who} cannot be imported: {_first_line(error)}") from error
    if check_pruner(found, who).name != name:
        raise ValueError(f"{who}: its class calls itself {found.name}; the entry point must have that name")
    return found


def check_pruner(found: Any, who: str) -> type[Pruner]:
    """A class, if it is a method that can be made from its defaults.

    Raises:
        ValueError: it is not; ``who`` says what is meant.
    """
    if not _is_pruner(found):
        raise ValueError(f"{who} is no pruning method; it must be a class that derives from vlmflow.Pruner")
    if found.stages is Pruner.stages:
        raise ValueError(f"{who} does not say its stages")
    missing = [f.name for f in fields(found) if f.init and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise ValueError(f"{who}: the field {missing[0]} needs a default")
    return found


def code_of(method: type[Pruner]) -> str:
    """Which code a method from outside is, for records; empty for vlmflow's own, whose version says it."""
    if is_shipped(method):
        return ""
    module = method.__module__
    file = vars(sys.modules[module]).get("__file__")
    return f"{Path(module).name}, sha256 {_digest(file)}" if file else module


def _run_file(given: Path) -> ModuleType:
    """The module of a file, run once. It is called by its path, so that its classes say where they can be found."""
    path = str(given.expanduser().resolve())
    if path in sys.modules:
        return sys.modules[path]
    if not Path(path).is_file():
        raise ValueError(f"no file {given}")
    module = ModuleType(path)
    module.__file__ = path
    sys.modules[path] = module  # dataclasses look there for the names in annotations
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), vars(module))
    except Exception as error:  # whatever a stranger's file does
        del sys.modules[path]
        raise ValueError(f"{given} cannot be imported: {_first_line(error)}") from error
    return module


def _import(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"{name} cannot be imported: {_first_line(error)}") from error
        raise ValueError(f"no module {name!r}; a file is named as path/to/file.py:Class") from None
    except Exception as error:  # whatever a stranger's module does
        raise ValueError(f"{name} cannot be imported: {_first_line(error)}") from error


def _reduce(pruner: Pruner) -> tuple[Any, ...]:
    """How a method of a file is pickled: another process cannot import the file, and runs it."""
    method = type(pruner)
    values = {field.name: getattr(pruner, field.name) for field in fields(pruner) if field.init}
    return _rebuild, (f"{method.__module__}:{method.__name__}", _digest(method.__module__), values)


def _rebuild(spec: str, digest: str, values: Mapping[str, Any]) -> Pruner:
    method = load_pruner(spec)
    if _digest(method.__module__) != digest:
        raise ValueError(f"{method.__module__} is not the file that it was where the run began")
    return method(**values)


def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]


def _is_pruner(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, Pruner) and found is not Pruner


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n")[0]
