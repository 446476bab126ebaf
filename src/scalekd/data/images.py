"""Decodes image files to 8-bit pixels, and keeps the list of files that cannot be read."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from scalekd.common import parallel
from scalekd.common.errors import UserError, first_line
from scalekd.common.files import append_to, cannot_write, read_bytes, write_text
from scalekd.common.text import printable

from .reading import steadily

# of the formats that Pillow decodes to pixels; not of those that it leaves to other programs (.eps) or cannot decode (.h5)
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".avifs", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".tga", ".icb", ".vda", ".vst",
    ".pcx", ".dcx", ".sgi", ".rgb", ".rgba", ".bw", ".psd", ".qoi", ".dds", ".ico", ".cur", ".icns", ".ras", ".im", ".msp",
    ".xbm", ".xpm", ".pcd", ".pxr", ".blp", ".ftc", ".ftu", ".gbr", ".fli", ".flc", ".fit", ".fits",
)  # fmt: skip

MOST_BYTES = 2 * 10**9  # of an image file; Pillow accepts fewer pixels than that
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """An image that cannot be used; the message is the reason."""


def is_image(name: str) -> bool:
    """Whether a file name has an image extension and is not hidden, like the `._1.jpg` that macOS puts in archives."""
    base = name.rpartition("/")[2]
    return base.lower().endswith(EXTENSIONS) and not base.startswith(".")


def read_file(path: str) -> bytes:
    """The content of a file.

    Raises `BadImage`, also for what is no plain file and for more than `MOST_BYTES`, and `Outage` if the file cannot be
    read for a reason of the system.
    """
    try:
        return steadily(lambda: read_bytes(path, MOST_BYTES), path)
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from None


def decode(data: bytes) -> Image.Image:
    """The first frame of an encoded image, turned upright, as 8-bit mode L or RGB. Raises `BadImage`.

    Transparency is dropped, and 16-bit grey is scaled so that 65535 becomes 255. docs/how-to/data.md has the full table.
    """
    return _opened(data, plain)


def decode_values(data: bytes) -> NDArray[np.int64]:
    """(H, W): the values in an encoded mask, turned upright as `decode` turns its image. Raises `BadImage`.

    A grey image of 1, 8, 16 or 32 bits gives its values, a palette image its indices. Colours are not class numbers.
    """
    return _opened(data, _values)


def decode_size(data: bytes) -> tuple[int, int]:
    """(width, height) of an encoded image, turned upright as by `decode`. Reads no pixels. Raises `BadImage`."""
    return _opened(data, _upright_size, load=False)


T = TypeVar("T")


def _opened(data: bytes, use: Callable[[Image.Image], T], load: bool = True) -> T:
    """`use` of an encoded image. Raises `BadImage` if it is damaged."""
    if not data:
        raise BadImage("it is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if load:
                image.load()
            return use(image)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImage("Pillow does not recognise it as an image") from None
    except Exception as error:  # for a damaged file Pillow may raise nearly anything
        raise BadImage(first_line(error)) from None


def plain(image: Image.Image) -> Image.Image:
    """A loaded image, turned upright, as 8-bit mode L or RGB. Raises `BadImage` if the range of its pixels is unknown."""
    image = _upright(image)
    if image.mode == "F":
        raise BadImage("its pixels are floating-point numbers of unknown range; convert it to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage("its pixels are not within 0 to 65535; convert it to 8 or 16 bits")
        if 0 < values.max() < 256:  # scaled from 16 bits it would be black
            raise BadImage(
                f"its pixels have 16 or 32 bits, but none is above {values.max()}: it holds 8-bit values. "
                "Convert it to 8 bits"
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    image.info.pop("transparency", None)  # of a palette; Pillow would warn that `convert` drops it
    return of_channels(1 if image.mode in ("1", "L", "LA", "La") else 3, image)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How to turn an image upright, from its EXIF data."""
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # the pixels may be fine although the EXIF data is damaged
        return None


def is_upright(image: Image.Image) -> bool:
    """Whether the image is stored as it should be seen. Reads no pixels."""
    return _turn(image) is None


def _upright(image: Image.Image) -> Image.Image:
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    sideways = (
        Image.Transpose.TRANSPOSE,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_90,
        Image.Transpose.ROTATE_270,
    )
    return (height, width) if _turn(image) in sideways else (width, height)


def _values(image: Image.Image) -> NDArray[np.int64]:
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        raise BadImage(f"is an image of mode {image.mode}; a mask has one channel with class numbers")
    return np.asarray(_upright(image)).astype(np.int64)


def of_channels(channels: int, image: Image.Image) -> Image.Image:
    """The image in grey for 1 channel, else in RGB. `convert` would copy it even if its mode is right (0.1 ms a photo)."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode in ("La", "RGBa"):  # Pillow converts premultiplied alpha only to plain alpha
        image = image.convert(image.mode.upper())
    return image if image.mode == mode else image.convert(mode)


# ---------------------------------------------------------------- unreadable images


class Bad(NamedTuple):
    """The name of an unreadable image and the reason."""

    name: str
    reason: str


class BadImages:
    """The unreadable images that a run skipped, each listed once; stops the run if there are too many.

    Each process adds the images that it meets; `exchange` gives them to all processes. The first one writes the list.

    Args:
        part: `train` or `val`.
        images: the number of images in this part.
        share: the share of bad images that is allowed, `data.max_bad`.
    """

    def __init__(self, part: str, images: int, share: float):
        self.part, self.images, self.allowed = part, images, _allowed(images, share)
        self.found: dict[str, str] = {}  # name: reason, both on one line
        self.fresh: list[Bad] = []  # those of them that the other processes do not know
        self.file: Path | None = None

    def keep_in(self, folder: Path, still_bad: Callable[[Iterable[str]], dict[str, str]] | None = None) -> None:
        """Lists bad images in `folder/bad-images.txt` from now on, and counts those already listed there.

        still_bad: gives the reason for each of the listed names that still cannot be read; the others are removed from
        the list. All processes must call this.
        """
        first = parallel.rank() == 0
        listed = parallel.from_first(read_list(folder) if first else [])
        before, self.found = self.found, {name: reason for part, name, reason in listed if part == self.part}
        if still_bad and self.found:
            self.found = parallel.from_first(still_bad(self.found) if first else {})
        if first:
            self.file = folder / "bad-images.txt"
            others = [entry for entry in listed if entry[0] != self.part]
            self._rewrite(listed, [*others, *((self.part, name, reason) for name, reason in self.found.items())])
        self.fresh = []
        self.add(Bad(name, reason) for name, reason in before.items())
        self.exchange()

    def add(self, bad: Iterable[Bad]) -> None:
        """Records bad images. Raises `UserError` if there are now more than allowed."""
        for name, reason in bad:
            name, reason = printable(name), printable(reason)
            if name not in self.found:
                self.found[name] = reason
                self.fresh.append(Bad(name, reason))
                self._write(f"{self.part}\t{name}\t{reason}\n")
        if parallel.world() == 1:
            self.check()

    def exchange(self) -> None:
        """Adds what the other processes found. All must call it. Raises the same `UserError` in all, as `check`."""
        for bad in parallel.gather(self.fresh):
            self.add(bad)
        self.fresh = []
        self.check()

    def check(self) -> None:
        """Raises `UserError` if there are more bad images than allowed."""
        if len(self.found) > self.allowed:
            name, reason = next(iter(self.found.items()))
            listed = f" {self.file} lists them." if self.file else ""
            raise UserError(
                f"{len(self.found)} of {self.images} images cannot be read, and data.max_bad allows {self.allowed}. "
                f"The first: {name}: {reason}.{listed}\nRepair or remove them, or raise data.max_bad."
            )

    def _rewrite(self, before: Sequence[Entry], now: Sequence[Entry]) -> None:
        """Writes the whole list if it changed, or if it is not in one complete file."""
        assert self.file is not None
        others = [file for file in _lists(self.file.parent) if file != self.file]
        if set(now) == set(before) and not others:
            if self.file.exists() and self.file.read_bytes()[-1:] not in (b"", b"\n"):
                self._write("\n")  # a killed run left an incomplete line
            return
        write_text(self.file, "".join("\t".join(entry) + "\n" for entry in now))
        for file in others:  # of the other processes of an earlier version
            file.unlink(missing_ok=True)

    def _write(self, text: str) -> None:
        if self.file is None:
            return
        try:
            with append_to(self.file) as file:
                file.write(text.encode())
        except OSError as error:
            raise cannot_write(self.file, error) from None


Entry = tuple[str, str, str]  # part, name and reason of a bad image


def _allowed(images: int, share: float) -> int:
    """A share of the images, but at least 3 (a tenth of fewer than 30): one bad file must not stop a small data set."""
    if share == 0:
        return 0
    return max(math.floor(images * share + 1e-9), min(3, images // 10))


def _lists(folder: Path) -> list[Path]:
    return sorted(folder.glob("bad-images*.txt"))


def read_list(folder: Path) -> list[Entry]:
    """(part, name, reason) of every bad image listed in a run's folder, without repeats."""
    entries: dict[tuple[str, str], str] = {}
    for file in _lists(folder):
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            fields = line.split("\t")
            if len(fields) == 3:
                entries.setdefault((fields[0], fields[1]), fields[2])
    return [(part, name, reason) for (part, name), reason in entries.items()]
