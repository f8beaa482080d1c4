"""Pictures as people have them: turned, deep, transparent, moving, huge, broken, or no files at all."""

import io
import json
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import SAMPLEFORMAT
from transformers.image_utils import load_image
from typer.testing import CliRunner

from vlmflow.cli import app
from vlmflow.core.images import MAX_PIXELS, ImageError, ImageWarning, as_rgb, open_image
from vlmflow.pico import samples
from vlmflow.tasks import Picture

ORIENTATION = 0x0112
RNG = np.random.default_rng(0)
COLOURS = Image.fromarray(RNG.integers(0, 256, (6, 10, 3), dtype=np.uint8))
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)  # every grey of 8 bits


def saved(image: Image.Image, kind: str, **how) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.mode == second.mode == "RGB" and first.size == second.size and first.tobytes() == second.tobytes()


def as_transformers(content: bytes, folder: Path) -> Image.Image:
    (folder / "picture").write_bytes(content)
    return load_image(str(folder / "picture"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_pictures_are_upright(tmp_path, kind, orientation):
    """By their EXIF orientation: the pixels that a viewer shows, as transformers' own loader has them."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    lossless = {"lossless": True} if kind == "WEBP" else {}
    content = saved(COLOURS, kind, exif=exif, **lossless)
    upright = open_image(content)
    assert upright.size == ((10, 6) if orientation < 5 else (6, 10))
    assert same(upright, as_transformers(content, tmp_path))
    if kind not in ("JPEG", "AVIF"):  # the turned pixels themselves, where saving changes none
        turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
        assert same(upright, COLOURS.transpose(turns[orientation]) if orientation > 1 else COLOURS)


def test_broken_exif_is_said_and_the_picture_read(tmp_path):
    content = saved(COLOURS, "PNG", exif=b"Exif\0\0no such thing")
    with pytest.warns(ImageWarning, match="broken EXIF"):
        assert same(open_image(content), COLOURS)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_what_needs_no_care_is_as_transformers_reads_it(tmp_path, mode):
    content = saved(COLOURS.convert(mode), "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    assert same(open_image(content), as_transformers(content, tmp_path))


GREY = Image.fromarray(RAMP).convert("RGB")


@pytest.mark.parametrize(
    "content",
    [
        saved(Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG"),
        saved(Image.fromarray(RAMP.astype(np.uint16) * 257), "TIFF"),
        saved(Image.fromarray((RAMP.astype(np.uint16) * 257).astype(">u2")), "TIFF"),
        b"P5 16 16 65535\n" + (RAMP.astype(np.uint16) * 257).astype(">u2").tobytes(),
        b"P5 16 16 4080\n" + (RAMP.astype(np.uint16) * 16).astype(">u2").tobytes(),
        saved(Image.fromarray(RAMP.astype(np.int32) * 70_000), "TIFF"),
        saved(Image.fromarray(RAMP.astype(np.int32) - 1_000), "TIFF"),
        saved(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"),
        saved(Image.fromarray(RAMP.astype(np.float32) * 3 - 100), "TIFF"),
    ],
    ids=["png16", "tiff16", "tiff16 big endian", "pgm16", "pgm12", "int32", "int32 below 0", "float", "float range"],
)
def test_deep_grey_is_scaled(content):
    assert same(open_image(content), GREY)


def test_unsigned_32_bits_are_no_negative_numbers():
    """Pillow reads the upper half of an unsigned TIFF as negative."""
    content = bytearray(saved(Image.fromarray((RAMP.astype(np.uint32) * 16_843_009).view(np.int32)), "TIFF"))
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from("<H", content, entry) == (SAMPLEFORMAT,):
            struct.pack_into("<H", content, entry + 8, 1)
    assert same(open_image(bytes(content)), GREY)


def test_float_between_0_and_1_is_not_stretched():
    content = saved(Image.fromarray(np.full((2, 2), 0.2, np.float32)), "TIFF")
    assert open_image(content).getpixel((0, 0)) == (51, 51, 51)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.full((2, 2), 7, np.int32), "every pixel of the image is 7"),
        (np.array([[0, np.nan]], np.float32), "not finite"),
        (np.array([[0, np.inf]], np.float32), "not finite"),
    ],
)
def test_grey_without_a_range_is_refused(values, says):
    with pytest.raises(ImageError, match=says):
        open_image(saved(Image.fromarray(values), "TIFF"))


def transparent(mode: str) -> tuple[bytes, tuple[int, int, int]]:
    """A picture whose left pixel is transparent and right one 100, or black, and what the right one is in RGB."""
    if mode in ("LA", "RGBA"):
        hidden, solid = {"LA": ((9, 0), (100, 255)), "RGBA": ((9, 9, 9, 0), (100, 100, 100, 255))}[mode]
        image = Image.new(mode, (2, 1), solid)
        image.putpixel((0, 0), hidden)
        return saved(image, "PNG"), (100, 100, 100)
    values = {"1": (1, 0), "L": (9, 100), "P": (0, 1), "RGB": ((9, 9, 9), (100, 100, 100)), "I;16": (700, 25700)}[mode]
    image = Image.new(mode, (2, 1), values[1])
    image.putpixel((0, 0), values[0])
    if mode == "P":
        image.putpalette([9, 9, 9, 100, 100, 100])
    solid = (0, 0, 0) if mode == "1" else (100, 100, 100)
    return saved(image, "PNG", transparency=values[0]), solid


@pytest.mark.parametrize("mode", ["LA", "RGBA", "1", "L", "P", "RGB", "I;16"])
def test_transparency_is_white(mode):
    content, solid = transparent(mode)
    image = open_image(content)
    assert [image.getpixel((0, 0)), image.getpixel((1, 0))] == [(255, 255, 255), solid]


def test_half_transparent_is_half_white():
    assert open_image(saved(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "PNG")).getpixel((0, 0)) == (127, 127, 127)


def test_opaque_alpha_changes_nothing(tmp_path):
    content = saved(COLOURS.convert("RGBA"), "PNG")
    assert same(open_image(content), as_transformers(content, tmp_path))
    assert same(open_image(content), COLOURS)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_of_moving_pictures_the_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.warns(ImageWarning, match="film has several frames"):
        red, green, blue = open_image(content, "film").getpixel((4, 4))
    assert red > 240
    assert max(green, blue) < 15


def test_one_frame_is_no_film():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_image(saved(COLOURS, "GIF"))


@pytest.mark.parametrize("kind", ["EPS", "PCX", "ICO", "TGA"])
def test_other_formats_are_refused(kind):
    with pytest.raises(ImageError, match=r"picture\.x is no image in a format that is read \(PNG, JPEG"):
        open_image(saved(COLOURS, kind), "picture.x")


def test_one_limit_of_pixels():
    side = 9_460  # a little above the limit, where Pillow only warns
    assert side * side > MAX_PIXELS
    content = saved(Image.new("1", (side, side)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="large has more than"):
            open_image(content, "large")
        with pytest.raises(ImageError, match="large has more than"):
            Picture("large", content).open()


def test_pipes_devices_and_folders_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        for read in (open_image, lambda path: Picture("p", path).open()):
            with pytest.raises(ImageError, match="no regular file"):
                read(path)


@pytest.mark.parametrize("cut", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "AVIF"])
def test_broken_files_are_named(kind, cut):
    """Cut short, a file gives a refusal that names it; never another error, never a part of the picture."""
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = saved(noise, kind)
    with pytest.raises(ImageError, match=r"photo\.x is "):
        open_image(content[: int(len(content) * cut)], "photo.x")


def test_a_picture_in_memory_is_read_alike():
    """As data sets and lmms-eval hand them over."""
    image = Image.open(io.BytesIO(transparent("RGBA")[0]))
    assert as_rgb(image, "document 1").getpixel((0, 0)) == (255, 255, 255)
    assert Picture("document 1", lambda: image).open().getpixel((0, 0)) == (255, 255, 255)


def test_eval_reads_what_a_person_would_have_converted(tmp_path):
    """Turned, deep, transparent and moving files, against the same pictures converted by hand: equal answers."""
    scenes = [Image.open(sample.image).convert("RGB") for sample in samples()[:4]]
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned, grey, clear, film = scenes
    turned.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "0.png", exif=exif)
    Image.fromarray(np.asarray(grey.convert("L")).astype(np.uint16) * 257).save(tmp_path / "1.png")
    cut = Image.new("L", clear.size, 255)
    cut.paste(0, (0, 0, 90, 90))
    hidden = clear.copy()
    hidden.putalpha(cut)
    hidden.save(tmp_path / "2.png")
    film.save(tmp_path / "3.png", save_all=True, append_images=[grey])
    by_hand = tmp_path / "by_hand"
    by_hand.mkdir()
    white = clear.copy()
    white.paste((255, 255, 255), (0, 0, 90, 90))
    for number, image in enumerate((turned, grey.convert("L").convert("RGB"), white, film)):
        image.save(by_hand / f"{number}.png")
    rows = {}
    for folder in (tmp_path, by_hand):
        data = [
            {"id": str(number), "image": f"{number}.png", "question": "Describe the picture.", "answer": "?"}
            for number in range(4)
        ]
        (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in data))
        command = ["eval", "--task", "jsonl", "--source", folder / "data.jsonl", "--out", folder / "out"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImageWarning)
            done = CliRunner().invoke(app, [str(part) for part in command], catch_exceptions=False)
        assert done.exit_code == 0, done.stderr
        rows[folder] = (folder / "out/rows.jsonl").read_text()
    assert rows[tmp_path] == rows[by_hand]
    assert len({json.loads(line)["answer"] for line in rows[by_hand].splitlines()}) > 1
