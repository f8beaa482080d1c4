"""Commands whose options come in groups: each group is a frozen dataclass, each of its fields an option."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any

import typer
from typer.core import TyperCommand


class OnceEach(TyperCommand):
    """A command that refuses an option that is given twice, where the later would silently count."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments that are no options."""
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        for option, count in Counter(option.name for option in order if not option.multiple).items():
            if count > 1:
                raise typer.BadParameter("given twice; leave one of the two", ctx, self._option(option))
        return super().parse_args(ctx, args)

    def _option(self, name: str | None) -> Any:
        return next(option for option in self.params if option.name == name)


def with_groups(function: Callable[..., None]) -> Callable[..., None]:
    """A function that takes groups of options, as a command that typer can read.

    typer wants every option as a parameter of its own. So it is shown the fields of a group in place of the group, and
    the function gets the group made from their values. A field is written as a parameter would be:
    ``limit: Annotated[int | None, typer.Option(min=1, help="How many.")] = None``.

    Raises:
        ValueError: two options of the command have one name.
    """
    groups: dict[str, type[Any]] = {}
    options: list[Parameter] = []
    for parameter in signature(function, eval_str=True).parameters.values():
        group = parameter.annotation
        if isinstance(group, type) and is_dataclass(group):
            groups[parameter.name] = group
            options += signature(group, eval_str=True).parameters.values()
        else:
            options.append(parameter)

    @wraps(function)
    def command(**values: Any) -> None:
        made = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        function(**made, **values)

    # by keyword, options with and without defaults may stand in any order
    flat = Signature([option.replace(kind=Parameter.KEYWORD_ONLY) for option in options])
    vars(command).update(__signature__=flat)
    return command
