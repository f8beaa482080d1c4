"""What rows cost under a pruner, beside what they would cost without it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vlmflow.core.cost import Cost
from vlmflow.core.geometry import Geometry
from vlmflow.evaluate.rows import Row
from vlmflow.pruners import Pruner


class Pricing:
    """The prices of a model's prefills under a pruner; samples of one shape are priced once."""

    def __init__(self, pruner: Pruner, geometry: Geometry | None) -> None:
        self._pruner, self._geometry = pruner, geometry
        self._known: dict[tuple[int, int, int], Cost] = {}

    def cost(self, row: Row) -> Cost | None:
        """One prefill's cost, pruned and not; None where the model's widths are not known."""
        if self._geometry is None or row.image_tokens is None:
            return None
        image = row.image_tokens[0]
        shape = (image, row.tokens - image, row.question_tokens)
        if shape not in self._known:
            self._known[shape] = self._pruner.cost(self._geometry, *shape)
        return self._known[shape]

    def record(self, row: Row) -> dict[str, Any] | None:
        """The figures for a row's record."""
        cost = self.cost(row)
        if cost is None:
            return None
        table = cost.table()
        pruned = {name: figures[1] for name, figures in table.items()}
        return pruned | {"shares": {name: figures[2] for name, figures in table.items()}}

    def total(self, rows: Iterable[Row]) -> Cost | None:
        """All rows' cost together, None where one is not known."""
        total: Cost | None = None
        for row in rows:
            cost = self.cost(row)
            if cost is None:
                return None
            total = cost if total is None else total + cost
        return total
