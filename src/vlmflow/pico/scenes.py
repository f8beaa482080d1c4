"""Deterministic scenes of named, coloured pictographs: the world that pico sees.

A scene is a pure function of its split, its seed, its canvas and its object counts. Objects never overlap. One
(object, colour) pair in twelve never occurs in the training split, so that a model which binds what it sees can be told
from one which remembers what it saw.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

Split = Literal["train", "held_out", "new_pairs"]

NAMES = (
    "sun", "cloud", "umbrella", "snowman", "star", "phone", "skull", "moon", "smiley", "king", "rook", "knight", "pawn",
    "spade", "heart", "diamond", "club", "note", "hammer", "anchor", "sword", "scales", "gear", "bolt", "scissors",
    "plane", "envelope", "pencil", "snowflake", "flower", "flag", "house", "mouse", "cat", "atom", "yinyang",
)  # fmt: skip
COLOURS = {
    "red": (220, 40, 40), "blue": (50, 80, 220), "green": (40, 160, 60), "yellow": (225, 195, 30),
    "orange": (240, 130, 20), "purple": (140, 50, 170), "brown": (120, 75, 40), "black": (25, 25, 25),
}  # fmt: skip
THEMES = {
    "sky": ("sun", "cloud", "umbrella", "star", "moon", "bolt", "plane"),
    "chess": ("king", "rook", "knight", "pawn"),
    "cards": ("spade", "heart", "diamond", "club"),
    "workshop": ("hammer", "gear", "scissors", "pencil", "scales", "anchor", "sword"),
    "home": ("house", "cat", "mouse", "flower", "phone", "envelope"),
    "winter": ("snowman", "snowflake"),
    "signs": ("skull", "smiley", "note", "flag", "atom", "yinyang"),
}
COLOUR_NAMES = tuple(COLOURS)
POPULAR = NAMES[::4]  # twice as frequent as the others, so that "popular" negatives mean something
THEME_OF = {name: theme for theme, names in THEMES.items() for name in names}
HELD_PAIRS = frozenset(
    (name, colour) for i, name in enumerate(NAMES) for j, colour in enumerate(COLOUR_NAMES) if (5 * i + 7 * j) % 12 == 0
)
CANVAS = 192  # side of the pictures that the shipped model reads, pixels
COUNTS = (2, 12)  # fewest and most objects of a scene that fills such a picture
SIZES = (20, 24, 28, 32)  # longer side of an object, pixels
TILTS = (-12, -6, 0, 6, 12)  # degrees
GLYPHS = Path(__file__).with_name("glyphs.png")  # a row for each size, a column for each name, in cells of four sizes


@dataclass(frozen=True)
class Thing:
    """One object of a scene; box is (x, y, width, height) in pixels."""

    name: str
    colour: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) in pixels."""
        x, y, width, height = self.box
        return x + width / 2, y + height / 2


@dataclass(frozen=True)
class Scene:
    """A square picture and the objects that it shows."""

    pixels: UInt8[np.ndarray, "canvas canvas 3"]
    things: tuple[Thing, ...]

    @property
    def canvas(self) -> int:
        """Side of the picture in pixels."""
        return self.pixels.shape[0]

    def image(self) -> Image.Image:
        """The picture as a PIL image."""
        return Image.fromarray(self.pixels)


@functools.cache
def _glyphs() -> Image.Image:
    """The pictographs as DejaVu Sans draws them at twice each size: no font, nor the program that draws it, is needed.

    Which of its pixels are grey, and how much, hangs on the version of FreeType; a scene may hang on its seed alone.
    """
    return Image.open(GLYPHS).convert("L")


@functools.cache
def _mask(name: str, size: int, tilt: int) -> Float[np.ndarray, "height width"]:
    """Opacity of a pictograph whose longer side is ``size`` pixels, from 0 to 1."""
    left, top = 4 * size * NAMES.index(name), sum(4 * smaller for smaller in SIZES if smaller < size)
    picture = _glyphs().crop((left, top, left + 4 * size, top + 4 * size))
    picture = picture.rotate(tilt, resample=Image.Resampling.BICUBIC)
    picture = picture.crop(picture.getbbox())
    scale = size / max(picture.size)
    width, height = (max(4, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture, np.float32) / 255


def _background(noise: np.random.Generator, canvas: int) -> Float[np.ndarray, "canvas canvas 3"]:
    """A light paper: a tint, a gradient, faint stripes and grain."""
    y, x = (np.arange(canvas, dtype=np.float32) / canvas - 0.5)[None].repeat(2, 0)
    tint, (slope_y, slope_x) = noise.uniform(190, 255, 3), noise.uniform(-25, 25, 2)
    turn, pitch, depth = noise.uniform(0, np.pi), noise.uniform(4, 16), noise.uniform(0, 5)
    phase = (np.cos(turn) * x[None] + np.sin(turn) * y[:, None]) * (canvas * 2 * np.pi / pitch)
    light = slope_y * y[:, None] + slope_x * x[None] + depth * np.sin(phase)
    light += 4 * noise.standard_normal((canvas, canvas), dtype=np.float32)
    return (light[..., None] + tint).astype(np.float32)


def _names(rng: random.Random, count: int, pool: list[str]) -> Iterator[str]:
    """Names for ``count`` objects: often from two themes, popular ones more often, some repeated."""
    world = pool
    if rng.random() < 0.35:
        themes = rng.sample(sorted(THEMES), 2)
        pool = [name for name in world if THEME_OF[name] in themes]
    chosen: list[str] = []
    for _ in range(count):
        if chosen and rng.random() < 0.15:
            yield rng.choice(chosen)
            continue
        left = [n for n in pool if n not in chosen] or [n for n in world if n not in chosen]
        chosen += rng.choices(left, [2 if name in POPULAR else 1 for name in left])
        yield chosen[-1]


def _colours(split: Split, name: str) -> list[str]:
    """The colours that a split allows for an object."""
    return [c for c in COLOUR_NAMES if ((name, c) in HELD_PAIRS) == (split == "new_pairs")]


def _place(
    rng: random.Random, name: str, canvas: int, boxes: list[tuple[int, int, int, int]]
) -> tuple[tuple[int, int, int, int], Float[np.ndarray, "height width"]] | None:
    """A free box for the object, and its mask; None when forty tries found none."""
    for attempt in range(40):
        size = rng.choice([s for s in SIZES if 2 * s + 2 <= canvas]) if attempt < 20 else SIZES[0]
        mask = _mask(name, size, rng.choice(TILTS))
        height, width = mask.shape
        x, y = rng.randint(1, canvas - width - 1), rng.randint(1, canvas - height - 1)
        if all(x + width <= a or a + w <= x or y + height <= b or b + h <= y for a, b, w, h in boxes):
            return (x, y, width, height), mask
    return None


def make_scene(split: Split, seed: int, canvas: int, counts: tuple[int, int]) -> Scene:
    """Draw the scene of a seed: between counts[0] and counts[1] objects (fewer where the canvas is full)."""
    rng = random.Random(f"{split} {seed} {canvas} {counts}")
    noise = np.random.default_rng(rng.getrandbits(64))
    pixels = _background(noise, canvas)
    things: list[Thing] = []
    for name in _names(rng, rng.randint(*counts), [n for n in NAMES if _colours(split, n)]):
        twins = [thing.colour for thing in things if thing.name == name]
        colours = [colour for colour in _colours(split, name) if colour not in twins]
        placed = _place(rng, name, canvas, [thing.box for thing in things])
        if not colours or placed is None:
            continue
        colour = rng.choice(colours)
        (x, y, width, height), mask = placed
        ink = np.array(COLOURS[colour], np.float32) + noise.normal(0, 8, 3).astype(np.float32)
        area = pixels[y : y + height, x : x + width]
        area += (ink - area) * mask[..., None]
        things.append(Thing(name, colour, (x, y, width, height)))
    return Scene(np.clip(pixels, 0, 255).astype(np.uint8), tuple(things))
