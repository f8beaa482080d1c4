"""The one place where a picture is read: any file that a user has, as the RGB image that a person would see."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import SAMPLEFORMAT, TiffImageFile

from vlmflow.core.errors import one_line

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs
_DEEP_GREY = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # Pillow's modes of more than 8 bits


class ImageError(ValueError):
    """A picture cannot be read; the message names it and says what to do."""


class ImageWarning(UserWarning):
    """A picture was read, but not all that its file holds."""


def open_image(file: str | Path | bytes, name: str | None = None) -> Image.Image:
    """Read a picture, from a file's path or its content, as ``as_rgb`` gives it.

    ``name`` is what messages call it, by default its path. Only the formats in ``FORMATS`` are tried.

    Raises:
        ImageError: no file, no picture, a broken one, or one of more than ``MAX_PIXELS``.
    """
    name = name or ("the image" if isinstance(file, bytes) else str(file))
    if not isinstance(file, bytes):
        _refuse_no_file(Path(file), name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, with the picture's name
            image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)
        with image:
            return as_rgb(image, name)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is no image in a format that is read ({', '.join(FORMATS)}); convert it") from error
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except PermissionError as error:
        raise ImageError(f"{name} cannot be read (permission denied)") from error
    except Exception as error:  # on a broken file Pillow's readers raise whatever they run into
        raise ImageError(f"{name} is broken ({one_line(error)}); get an intact copy") from error


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """A picture in RGB: upright as its EXIF orientation says, transparent parts on white, the first of its frames.

    Grey of more than 8 bits is scaled, never clipped: 16 bits by their full range, floating point between 0 and 1 by
    255, all else from its lowest to its highest value. What differs from ``transformers.image_utils.load_image`` is
    transparency, whose hidden colours show there, and deep grey, which is clipped there.

    Raises:
        ImageError: more than ``MAX_PIXELS``, or deep grey that has no range.
        OSError: and whatever else Pillow raises on a broken file.
    """
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name)
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a JPEG of some phones, with previews
        _warn(f"{name} has several frames or pages; only the first is read")
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    is_unsigned = image.mode == "I" and _is_unsigned(image)
    image = _upright(image, name)
    if image.mode in _DEEP_GREY:
        values = np.asarray(image).astype(np.uint32) if is_unsigned else np.asarray(image)
        return _shallow(values, image, name, is_16_bit).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _refuse_no_file(path: Path, name: str) -> None:
    if not path.exists():
        raise ImageError(f"no image file at {name}")
    if not path.is_file():
        raise ImageError(f"{name} is no regular file (a folder, a pipe or a device); name an image file")
    if path.stat().st_size == 0:
        raise ImageError(f"the image file {name} is empty")


def _too_large(name: str) -> ImageError:
    return ImageError(f"{name} has more than {MAX_PIXELS:,} pixels; make it smaller first")


def _upright(image: Image.Image, name: str) -> Image.Image:
    image.load()  # what is wrong with the pixels shows here; what fails below is the EXIF alone
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's EXIF reader raises whatever it runs into
        _warn(f"{name} has broken EXIF data ({type(error).__name__}); it is read as it lies in the file")
        return image


def _is_unsigned(image: Image.Image) -> bool:
    """Whether 32-bit pixels are unsigned, for which Pillow has no mode: it reads the upper half as negative."""
    return isinstance(image, TiffImageFile) and image.tag_v2.get(SAMPLEFORMAT, (1,)) == (1,)


def _shallow(values: np.ndarray, image: Image.Image, name: str, is_16_bit: bool) -> Image.Image:
    """Deep grey as 8 bits; ``values`` are the pixels of ``image``."""
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError(f"{name} has pixels that are not finite (nan or inf); mend them")
    low, high = (0, 65535) if is_16_bit else (values.min(), values.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0, 1
    if low == high:
        raise ImageError(f"every pixel of {name} is {low:g}, which gives no range of grey; save it with 8 bits")
    levels = np.rint((values - low) / (high - low) * 255)
    if "transparency" in image.info:
        levels[values == image.info["transparency"]] = 255
    return Image.fromarray(levels.astype(np.uint8))


def _warn(text: str) -> None:
    warnings.warn(text, ImageWarning, stacklevel=2)
