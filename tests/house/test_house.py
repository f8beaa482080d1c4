"""Who may import whom, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vlmflow
from docs.make import house
from docs.make.page import put

SOURCE = Path(vlmflow.__file__).parent
FLOORS = [
    *("core", "records", "pico", "pruners", "tasks", "figures", "engine"),
    *("models", "speed", "evaluate", "flow", "plugins", "cli"),
]


def imports(path: Path) -> set[str]:
    """The rooms of this package that a file imports at its top or inside."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    names = {node.module for node in nodes if node.module} | {
        f"{node.module}.{alias.name}" for node in nodes if node.module == "vlmflow" for alias in node.names
    }
    return {name.split(".")[1] for name in names if name.startswith("vlmflow.")} & {*FLOORS}


def test_every_room_is_a_floor():
    assert {path.name for path in SOURCE.iterdir() if path.name[0] != "_" and path.is_dir()} == {*FLOORS}
    assert {path.name for path in SOURCE.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*/**/*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_floor_imports_those_named_before_it(path):
    floor = FLOORS.index(path.relative_to(SOURCE).parts[0])
    assert imports(path) <= {*FLOORS[: floor + 1]}


@pytest.mark.parametrize(
    ("room", "banned"),
    [
        ("vlmflow", {"torch", "transformers", "matplotlib"}),
        ("vlmflow.core.families", {"torch", "transformers", "matplotlib"}),
        ("vlmflow.core.cost", {"torch", "transformers", "matplotlib"}),
        ("vlmflow.evaluate.published", {"torch", "transformers", "matplotlib"}),
        ("vlmflow.figures.analysis", {"torch", "transformers"}),
        ("vlmflow.pico", {"torch", "transformers", "matplotlib"}),
        ("vlmflow.pruners", {"torch", "transformers", "matplotlib"}),
        ("vlmflow.cli", {"torch", "transformers", "matplotlib"}),
        ("vlmflow.engine", {"matplotlib"}),
    ],
)
def test_light_rooms_stay_light(room, banned):
    code = f"import sys, {room}; print(*({banned!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


@pytest.mark.parametrize(
    "args", [["--help"], ["eval", "--help"], ["flow", "saliency", "--help"], ["pruners"], ["cost"], ["cost", "--paper"]]
)
def test_commands_without_a_model_import_no_torch(args):
    code = """
import atexit, sys
from vlmflow.cli import main
atexit.register(lambda: print("loaded:", *({"torch", "transformers", "matplotlib"} & {*sys.modules})))
main()
"""
    run = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    assert len(run.stdout) > 300
    assert run.stdout.strip().split("\n")[-1] == "loaded:"


def test_public_names_exist():
    for name in vlmflow.__all__:
        assert getattr(vlmflow, name).__name__ if name != "PRUNERS" else vlmflow.PRUNERS
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = vlmflow.nonsense


def test_the_page_shows_the_rooms_as_they_are():
    """``python -m docs.make.house`` writes them anew."""
    page = house.PAGE.read_text(encoding="utf-8")
    assert put(page, "rooms", house.rooms()) == page
