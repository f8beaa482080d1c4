"""Draw the pictographs of the scenes once, from matplotlib's copy of DejaVu Sans: ``python -m recipes.pico.glyphs``.

The sheet is shipped, so that a scene needs neither the font nor the FreeType that drew it: another FreeType may draw
other greys, and the shipped samples, questions and results are of these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib
import typer
from PIL import Image, ImageDraw, ImageFont

from vlmflow.pico.scenes import GLYPHS, NAMES, SIZES

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
CHARACTERS = {
    "sun": "☀", "cloud": "☁", "umbrella": "☂", "snowman": "☃", "star": "★", "phone": "☎", "skull": "☠", "moon": "☾",
    "smiley": "☺", "king": "♚", "rook": "♜", "knight": "♞", "pawn": "♟", "spade": "♠", "heart": "♥", "diamond": "♦",
    "club": "♣", "note": "♫", "hammer": "⚒", "anchor": "⚓", "sword": "⚔", "scales": "⚖", "gear": "⚙", "bolt": "⚡",
    "scissors": "✂", "plane": "✈", "envelope": "✉", "pencil": "✏", "snowflake": "❄", "flower": "✿", "flag": "⚑",
    "house": "⌂", "mouse": "🐭", "cat": "🐱", "atom": "⚛", "yinyang": "☯",
}  # fmt: skip


def sheet() -> Image.Image:
    """A row for each size, a column for each name; see ``vlmflow.pico.scenes.GLYPHS``."""
    drawn = Image.new("L", (4 * max(SIZES) * len(NAMES), sum(4 * size for size in SIZES)))
    top = 0
    for size in SIZES:
        font = ImageFont.truetype(str(FONT), 2 * size)
        for column, name in enumerate(NAMES):
            cell = Image.new("L", (4 * size, 4 * size))
            ImageDraw.Draw(cell).text((size, size), CHARACTERS[name], font=font, fill=255)
            drawn.paste(cell, (4 * size * column, top))
        top += 4 * size
    return drawn


def main(path: Annotated[Path, typer.Option(help="Picture to write.")] = GLYPHS) -> None:
    """Draw the sheet."""
    sheet().save(path, optimize=True)


if __name__ == "__main__":
    typer.run(main)
