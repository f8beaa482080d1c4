"""How errors are worded: who, what was wanted, what came, what to do; and how those of others are told in one line."""

from __future__ import annotations


def refusal(who: str, wanted: str, got: object, todo: str) -> ValueError:
    """The error that says who refuses, what was wanted, what came, and what to do."""
    return ValueError(f"{who}: wanted {wanted}, got {got}; {todo}")


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type where it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def typed_line(error: BaseException) -> str:
    """``one_line`` with the error's type, for records."""
    line, name = one_line(error), type(error).__name__
    return line if line == name else f"{name}: {line}"
