"""What each of the model's patches shows of a scene: the labels of the lessons in which patches name and count."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from vlmflow.pico.scenes import COLOUR_NAMES, NAMES, Scene

PATCH = 8  # pixels, at every canvas


@dataclass(frozen=True)
class PatchLabels:
    """What each patch of a scene shows, in raster order; -1 where it shows nothing."""

    name: Int[np.ndarray, " patches"]
    colour: Int[np.ndarray, " patches"]
    quarter: Int[np.ndarray, " patches"]  # of the picture, in which the object's centre lies: questions.PLACES' order
    centre: Int[np.ndarray, " patches"]  # 1 in the one patch that holds an object's centre, else 0


def patch_labels(scene: Scene) -> PatchLabels:
    """Label every patch that an object's box touches; where two boxes share a patch the later one has it."""
    side = scene.canvas // PATCH
    name = np.full((side, side), -1)
    colour, quarter, centre = name.copy(), name.copy(), np.zeros_like(name)
    for thing in scene.things:
        x, y, width, height = thing.box
        patches = np.s_[y // PATCH : (y + height - 1) // PATCH + 1, x // PATCH : (x + width - 1) // PATCH + 1]
        name[patches] = NAMES.index(thing.name)
        colour[patches] = COLOUR_NAMES.index(thing.colour)
        quarter[patches] = 2 * (thing.centre[1] >= scene.canvas / 2) + (thing.centre[0] >= scene.canvas / 2)
        centre[int(thing.centre[1]) // PATCH, int(thing.centre[0]) // PATCH] = 1
    return PatchLabels(name.ravel(), colour.ravel(), quarter.ravel(), centre.ravel())
