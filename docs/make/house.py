"""Write the rooms into docs/house.md, from what each file says of itself: ``python -m docs.make.house``."""

from __future__ import annotations

import ast
from pathlib import Path

from docs.make.page import ROOT, put
from vlmflow.records.files import write_text
from vlmflow.records.table import Table

PAGE = ROOT / "docs" / "house.md"
SOURCE = ROOT / "src" / "vlmflow"


def rooms() -> str:
    """Every floor and every file of it, with the first sentence of its docstring."""
    rows = []
    for floor in sorted(path for path in SOURCE.iterdir() if (path / "__init__.py").exists()):
        rows.append([f"**`{floor.name}/`**", f"**{_says(floor / '__init__.py')}**"])
        inside = (path for path in sorted(floor.rglob("*.py")) if path.name not in ("__init__.py", "__main__.py"))
        rows += [[f"`{path.relative_to(SOURCE)}`", _says(path)] for path in inside]
    return Table(["room", "what it does"], rows).markdown().rstrip()


def _says(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split()).replace("``", "`").rstrip(".")


if __name__ == "__main__":
    write_text(PAGE, put(PAGE.read_text(encoding="utf-8"), "rooms", rooms()))
