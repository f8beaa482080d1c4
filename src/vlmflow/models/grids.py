"""Where image tokens lie in their images, and the images as a model sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmflow.core.grids import READERS
from vlmflow.core.widths import Config


def patch_grids(
    inputs: dict[str, torch.Tensor], config: Any, n_image: int, n_pictures: int
) -> list[tuple[int, int]] | None:
    """Rows and columns of the image tokens of each image in a prompt, None where they are not one grid an image.

    ``inputs`` is one encoded question, ``n_image`` its number of image tokens, ``n_pictures`` that of its images. The
    tokens of an image that was cut into tiles follow one another tile by tile, in no grid of the image.
    """
    for read in READERS:
        if (grids := read(inputs, Config(config), n_image, n_pictures)) is not None:
            return grids if sum(rows * columns for rows, columns in grids) == n_image else None
    return None


def seen_images(inputs: dict[str, torch.Tensor], images: Sequence[Image.Image]) -> list[Image.Image]:
    """The images as the model sees them: resized and cropped, less padding, where its pixels still form a picture."""
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.dim() != 4 or pixels.shape[0] != len(images):
        return list(images)
    sizes = inputs.get("image_sizes", [pixels.shape[2:]] * len(images))
    return [_picture(image[:, :height, :width]) for image, (height, width) in zip(pixels, sizes, strict=True)]


def _picture(pixels: torch.Tensor) -> Image.Image:
    """Normalised pixels, each channel from its lowest to its highest value."""
    array = pixels.float().cpu().numpy().transpose(1, 2, 0)
    low, high = array.min((0, 1)), array.max((0, 1))
    return Image.fromarray(((array - low) / np.maximum(high - low, 1e-6) * 255).astype(np.uint8))
