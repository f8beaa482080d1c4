"""Every method at the same mean number of image tokens a layer, so that what is compared costs the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlmflow.pruners import PRUNERS, Pruner, Task, Unpruned, find_pruner, parse_fields
from vlmflow.pruners.outside import code_of


def for_task(
    method: str | type[Pruner],
    settings: Mapping[str, str],
    preset: Task,
    n_layers: int,
    attends: Sequence[bool] = (),
) -> tuple[Pruner, str]:
    """A method as its source sets it for the task, with fields set from text over it; and where from, for records.

    ``attends`` says which layers do, where some are recurrent.

    Raises:
        ValueError: unknown method or field, or a value that the field does not take.
    """
    cls, values = find_pruner(method), parse_fields(method, settings)
    pruner, origin = cls.for_task(preset, n_layers)
    pruner = pruner.fitted(attends) if attends else pruner
    chosen = ", ".join(f"{field}={value}" for field, value in settings.items())
    parts = [code_of(cls), origin, f"set: {chosen}" if chosen else ""]
    return replace(pruner, **values), "; ".join(part for part in parts if part)


def with_budget(
    method: str | type[Pruner], share: float, n_layers: int, preset: Task = "qa", attends: Sequence[bool] = ()
) -> Pruner:
    """A method whose mean number of image tokens entering a layer is ``share`` of all (see ``Pruner.at_budget``).

    It starts from its fields for the task. ``attends`` is as in ``for_task``.

    Raises:
        ValueError: unknown method, a share outside (0, 1), or one that the method cannot give.
    """
    cls = find_pruner(method)
    if cls is Unpruned:
        others = ", ".join(name for name in PRUNERS if name != cls.name)
        raise ValueError(f"a budget needs one of {others}, got {cls.name!r}")
    if not 0 < share < 1:
        raise ValueError(f"a budget is a share of the image tokens above 0 and below 1, got {share:g}")
    return for_task(cls, {}, preset, n_layers, attends)[0].at_budget(share, n_layers)
