"""Write docs/families.md, which types of transformers are pruned: ``python -m docs.make.families``."""

from __future__ import annotations

import json

from docs.make.page import ROOT, put
from vlmflow.core.families import FAMILIES
from vlmflow.records.files import write_text
from vlmflow.records.table import Table

PAGE = ROOT / "docs" / "families.md"
TABLE = ROOT / "docs" / "families.json"  # tests/families holds every row of it to the truth


def families() -> str:
    """Every type with what it is known as, and whether it is pruned, or why not."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    verdicts = {name: f"works{remark and f'; {remark}'}" for name, remark in table["works"].items()}
    verdicts |= {name: f"refused: {row['because']}" for name, row in table["refused"].items()}
    rows = [
        [f"`{name}`", FAMILIES[name].known_as if name in FAMILIES else "", verdicts[name]] for name in sorted(verdicts)
    ]
    return Table(["type", "known as", "works, or why not"], rows).markdown().rstrip()


if __name__ == "__main__":
    write_text(PAGE, put(PAGE.read_text(encoding="utf-8"), "families", families()))
