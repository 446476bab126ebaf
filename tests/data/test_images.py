"""Unusual image files: the decoded pixels, or the reason why the image is bad."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from scalekd.data.images import BadImage, decode

random = np.random.default_rng(0)
PIXELS = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY_16 = np.array([[0, 257, 65535], [32896, 128, 129]], np.uint16)
GREY_8 = [[0, 1, 255], [128, 0, 1]]  # by hand: rounded 257ths


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG written by hand, because Pillow cannot write 16-bit colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff_16_big_endian() -> bytes:
    tags = [(256, 3), (257, 2), (258, 16), (259, 1), (262, 1), (273, 8 + 2 + 9 * 12 + 4), (277, 1), (278, 2), (279, 12)]
    entries = b"".join(struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return b"MM\0*" + struct.pack(">IH", 8, 9) + entries + bytes(4) + GREY_16.astype(">u2").tobytes()


def values(data: bytes) -> list:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return np.array(decode(data)).tolist()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_plain_colour(kind):
    assert values(encoded(Image.fromarray(PIXELS), kind)) == PIXELS.tolist()


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(GREY_16), "PNG"),
        encoded(Image.fromarray(GREY_16), "TIFF"),
        tiff_16_big_endian(),
        b"P5 3 2 65535\n" + GREY_16.astype(">u2").tobytes(),
    ],
    ids=["png", "tiff", "tiff big-endian", "pgm"],
)
def test_16_bit_grey_is_scaled(data):
    assert values(data) == GREY_8
    assert decode(data).mode == "L"


def test_16_bit_colour_keeps_its_high_bytes():
    pixels = np.array([[65535, 257, 1000], [255, 128, 32896]], ">u2")
    assert values(png(2, 1, 16, 2, b"\0" + pixels.tobytes())) == [[[255, 1, 3], [0, 0, 128]]]


@pytest.mark.parametrize("value", [-5, 70000])
def test_32_bit_grey_is_refused(value):
    data = encoded(Image.fromarray(np.array([[0, value]], np.int32)), "TIFF")
    with pytest.raises(BadImage, match="not within 0 to 65535; convert it"):
        decode(data)


def test_floating_point_is_refused():
    with pytest.raises(BadImage, match="floating-point numbers of unknown range"):
        decode(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))


@pytest.mark.parametrize("kind, close", [("TIFF", 0), ("JPEG", 2)])
def test_cmyk(kind, close):
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    assert np.abs(np.array(values(encoded(ink, kind))) - (255, 0, 0)).max() <= close


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([250, 0, 0, 0, 0, 240])
    image.putpixel((1, 0), 1)
    return image


@pytest.mark.parametrize("kind, transparency", [("PNG", None), ("PNG", 1), ("PNG", bytes([9, 0])), ("GIF", 1)])
def test_palettes_with_and_without_transparency(kind, transparency):
    options = {} if transparency is None else {"transparency": transparency}
    assert values(encoded(palette(), kind, **options)) == [[[250, 0, 0], [0, 0, 240]]]


def test_transparency_is_dropped():
    assert values(encoded(Image.new("RGBA", (1, 1), (10, 20, 30, 0)), "PNG")) == [[[10, 20, 30]]]
    assert np.array(decode(encoded(Image.new("LA", (1, 1), (100, 0)), "PNG")).convert("L")).tolist() == [[100]]


def test_one_bit():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert values(encoded(image, "PNG")) == [[0, 255]]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.abs(np.array(values(data), int) - (255, 0, 0)).max() <= 1


UPRIGHT = {  # orientation: what turns the stored pixels upright, by the EXIF standard
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
    77: lambda a: a,  # no orientation at all
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(PIXELS), kind, exif=exif)
    assert values(data) == UPRIGHT[orientation](PIXELS).tolist()


def test_damaged_exif_does_not_make_an_image_bad():
    data = encoded(Image.fromarray(PIXELS), "PNG", exif=b"Exif\0\0no TIFF header")
    with pytest.raises(SyntaxError, match="not a TIFF file"):
        Image.open(io.BytesIO(data)).getexif()
    assert np.array(decode(data)).tolist() == PIXELS.tolist()


WHOLE = {kind: encoded(Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
         for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF")}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_truncated(kind, share):
    with pytest.raises(BadImage, match=r"\w"):
        decode(WHOLE[kind][: int(len(WHOLE[kind]) * share)])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", WHOLE)
def test_damage_is_a_bad_image_or_pixels_and_nothing_else(kind, seed):
    data = bytearray(WHOLE[kind])
    changed = np.random.default_rng(seed)
    for place in changed.integers(0, len(data), 40):
        data[place] = changed.integers(0, 256)
    try:
        assert decode(bytes(data)).mode in ("L", "RGB")
    except BadImage as bad:
        assert str(bad)


def test_reasons():
    damaged = bytearray(WHOLE["PNG"])
    damaged[len(damaged) // 2] ^= 255
    for data, reason in [
        (b"", r"it is empty \(0 bytes\)"),
        (b"not an image", "Pillow does not recognise it as an image"),
        (WHOLE["JPEG"][:2000], "truncated"),
        (bytes(damaged), "broken"),
        (png(30_000, 30_000, 8, 0, b"\0"), "900000000 pixels"),
    ]:
        with pytest.raises(BadImage, match=reason):
            decode(data)
