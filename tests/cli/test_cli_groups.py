"""Options in groups: what typer shows of a function that takes dataclasses, and what the function gets."""

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from vlmflow.cli.groups import with_groups


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option("--width", "-w", min=1, help="From left to right.")]
    height: Annotated[int, typer.Option(help="From top to bottom.")] = 2
    labels: Annotated[list[str] | None, typer.Option("--label")] = None


@dataclass(frozen=True)
class Colour:
    height: Annotated[float, typer.Option()] = 0.5


def app_of(function):
    app = typer.Typer(rich_markup_mode=None)
    app.command()(with_groups(function))
    return app


@pytest.fixture
def drawing():
    """An app whose command puts its arguments into the list that comes with it."""
    got = []

    def draw(*, first: Annotated[str, typer.Option()] = "a", size: Size, last: Annotated[bool, typer.Option()] = False):
        """Draw."""
        got.append((first, size, last))

    return app_of(draw), got


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["-w", "3"], ("a", Size(3), False)),
        (
            ["--last", "--label", "x", "--label", "y", "--height", "7", "--width", "1", "--first", "b"],
            ("b", Size(1, 7, ["x", "y"]), True),
        ),
    ],
)
def test_a_function_gets_its_groups_whole(drawing, args, wanted):
    app, got = drawing
    assert CliRunner().invoke(app, args, catch_exceptions=False).exit_code == 0
    assert got == [wanted]


@pytest.mark.parametrize(("args", "says"), [([], "Missing option '--width'"), (["--width", "0"], "'--width'")])
def test_typer_checks_a_groups_fields(drawing, args, says):
    app, got = drawing
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 2
    assert says in done.stderr
    assert got == []


def test_the_help_shows_the_fields_where_the_group_stands(drawing):
    shown = CliRunner().invoke(drawing[0], ["--help"]).stdout
    names = ["Draw.", "--first", "-w, --width", "From left to right.", "--height", "[default: 2]", "--label", "--last"]
    places = [shown.index(name) for name in names]
    assert places == sorted(places)


def test_two_options_of_one_name_are_refused():
    def draw(size: Size, colour: Colour): ...

    with pytest.raises(ValueError, match="duplicate parameter name: 'height'"):
        with_groups(draw)
