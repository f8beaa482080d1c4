"""How figures look, and how they are written."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from vlmflow.records.files import replacing

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito, told apart by all
MARKERS = "osD^vP"


def save_both(figure: Figure, stem: Path) -> None:
    """As PNG and SVG; the same figure gives the same bytes."""
    with matplotlib.rc_context({"svg.hashsalt": stem.name}):
        save(figure, stem.with_suffix(".png"))
        save(figure, stem.with_suffix(".svg"))


def save(figure: Figure, path: Path) -> None:
    """Write a picture whole or not at all."""
    undated = {"Date": None} if path.suffix == ".svg" else {}
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=150, metadata=undated)
