"""Who may import whom, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vlmflow

SOURCE = Path(vlmflow.__file__).parent
FLOORS = [  # a room may import those below it, and its own floor
    {"layout", "attention", "geometry", "pico", "backends"},
    {"cost"},
    {"pruners", "published"},
    {"engine"},
    {"processors"},
    {"flow", "models", "synthetic"},
    {"ask", "tasks", "latency"},
    {"evaluate"},
    {"experiments"},
    {"plots", "lmms"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports(path: Path) -> set[str]:
    """The rooms of this package that a file imports at its top or inside."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    names = {node.module for node in nodes if node.module} | {
        f"{node.module}.{alias.name}" for node in nodes if node.module == "vlmflow" for alias in node.names
    }
    return {name.split(".")[1] for name in names if name.startswith("vlmflow.")} & FLOOR.keys()


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_rooms_import_downwards(path):
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return
    for other in imports(path) - {room}:
        assert FLOOR[other] <= FLOOR[room], f"{room} may not import {other}"
        assert other != "cli" or room == "cli"


@pytest.mark.parametrize(
    ("room", "banned"),
    [
        ("vlmflow", {"torch", "transformers", "matplotlib"}),
        ("vlmflow.cost", {"torch", "transformers", "matplotlib"}),
        ("vlmflow.published", {"torch", "transformers", "matplotlib"}),
        ("vlmflow.plots", {"torch", "transformers"}),
        ("vlmflow.pico", {"torch", "transformers", "matplotlib"}),
        ("vlmflow.pruners", {"transformers", "matplotlib"}),
        ("vlmflow.engine", {"matplotlib"}),
    ],
)
def test_light_rooms_stay_light(room, banned):
    code = f"import sys, {room}; print(*({banned!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_public_names_exist():
    for name in vlmflow.__all__:
        assert getattr(vlmflow, name).__name__ if name != "PRUNERS" else vlmflow.PRUNERS
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = vlmflow.nonsense
