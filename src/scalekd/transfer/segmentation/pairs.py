"""Images with masks of classes: ADE20K's format, or any folder of images and one of masks. docs/how-to/transfer.md.

A mask says the class of every pixel; `IGNORED` is a pixel without one: neither trained on nor counted.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from scalekd.common.errors import UserError, first_line
from scalekd.common.seeds import seed_from
from scalekd.common.text import printable
from scalekd.data.images import BadImage, decode, is_image

IGNORED = 255
MOST_CLASSES = 255  # a mask has 8 bits, and one value is taken
MASKS = ("annotations", "masks", "labels")  # what the folder beside images/ may be called
PARTS = {"train": ("training", "train"), "val": ("validation", "val", "test")}
CLASS_FILES = ("classes.txt", "objectInfo150.txt")  # ours; ADE20K's own
LOOKED_AT = 8  # pairs read when a set is opened: enough to meet what is wrong with all of them

Mask = NDArray[np.uint8]  # (H, W): class, or IGNORED


@dataclass(frozen=True)
class Pairs:
    """Image files and their masks' files, in one order. `pairs[i]` reads both. Picklable."""

    images: Sequence[Path]
    masks: Sequence[Path]
    classes: Sequence[str]
    reduce_zero_label: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Image.Image, Mask]:
        """The upright image, mode L or RGB, and its mask. Raises `BadImage`."""
        try:
            image = decode(self.images[i].read_bytes())
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from None
        try:
            mask = as_classes(read_mask(self.masks[i]), self.classes, self.reduce_zero_label)
        except BadImage as error:
            raise BadImage(f"its mask {self.masks[i]}: {error}") from None
        if mask.shape != image.size[::-1]:
            other = "x".join(map(str, mask.shape[::-1]))
            raise BadImage(
                f"its mask {self.masks[i]} has {other} pixels, the image {image.width}x{image.height}"
                + " (upright, as its EXIF data say)" * (mask.shape == image.size)
            )
        return image, mask

    def where(self, i: int) -> str:
        return str(self.images[i])


def open_segments(
    root: Path,
    *,
    classes: Path | None = None,
    reduce_zero_label: bool = False,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> tuple[Pairs, Pairs]:
    """(training, validation) pairs of a folder. Raises `UserError`.

    root: `images/training`, `annotations/training`, `images/validation`, `annotations/validation` as in ADE20K, or
      `train/images`, `train/masks` and so on (`MASKS`, `PARTS` have the names). Without parts, `images` and `masks`
      alone, a seeded `val_fraction` of the pairs validates.
    classes: a file with the name of a class per line, class 0 first; else `root/classes.txt`, else ADE20K's own list.
    reduce_zero_label: masks hold 0 for "other", which is ignored, and count the classes from 1, as in ADE20K.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder")
    names = read_classes(classes or classes_file(root))
    folders = {part: part_folders(root, part) for part in PARTS}
    if folders["train"] and folders["val"]:
        train, val = (open_pairs(*found, names, reduce_zero_label) for found in folders.values() if found)
        return train, val
    whole = next(((root / "images", root / m) for m in MASKS if (root / m).is_dir()), None)
    if whole is None or not whole[0].is_dir() or folders["train"] or folders["val"]:
        raise UserError(
            f"{root} holds no images with masks: there must be images/training, annotations/training, "
            "images/validation and annotations/validation, or train/images, train/masks, val/images and val/masks, "
            "or images and masks alone"
        )
    return _held_out(open_pairs(*whole, names, reduce_zero_label), val_fraction, seed)


def open_pairs(images: Path, masks: Path, classes: Sequence[str], reduce_zero_label: bool = False) -> Pairs:
    """All images of a folder and its sub-folders with their masks, by name without extension. Raises `UserError`.

    A few pairs are read, so that what is wrong with all of them is told before a run starts.
    """
    most = MOST_CLASSES - reduce_zero_label
    if len(classes) > most:
        raise UserError(f"{len(classes)} classes: masks are held in 8 bits, for {most} classes and ignored pixels")
    found, theirs = _by_name(images), _by_name(masks)
    for one, other, what in ((found, theirs, "masks"), (theirs, found, "images")):
        alone = sorted(one.keys() - other.keys())
        if alone:
            have, lack = (images, masks) if what == "masks" else (masks, images)
            raise UserError(
                f"{len(alone)} of {len(one)} files in {have} have no {what} of the same name in {lack}, such as "
                f"{one[alone[0]].name}: add them, or remove those files"
            )
    lossy = next((file for file in theirs.values() if file.suffix.lower() in (".jpg", ".jpeg", ".webp")), None)
    if lossy is not None:
        raise UserError(f"{lossy}: {lossy.suffix} does not keep the values of a mask exactly; save masks as .png")
    names = sorted(found)
    pairs = Pairs([found[n] for n in names], [theirs[n] for n in names], list(classes), reduce_zero_label)
    _look_at(pairs)
    return pairs


def _by_name(folder: Path) -> dict[str, Path]:
    """The images in a folder and below, by path without extension. Raises `UserError`."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    files: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if not is_image(file.name):
            continue
        if name in files:
            raise UserError(f"{files[name]} and {file.name} have one name without extension; keep one of them")
        files[name] = file
    if not files:
        raise UserError(f"{folder} holds no images")
    return files


def part_folders(root: Path, part: str) -> tuple[Path, Path] | None:
    """The folders of images and masks of a part, in either order of names."""
    for name in PARTS[part]:
        for masks in MASKS:
            for pair in ((root / "images" / name, root / masks / name), (root / name / "images", root / name / masks)):
                if all(folder.is_dir() for folder in pair):
                    return pair
    return None


def _held_out(pairs: Pairs, share: float, seed: int) -> tuple[Pairs, Pairs]:
    held = max(1, round(len(pairs) * share))
    if held >= len(pairs):
        raise UserError(f"{len(pairs)} images with masks are too few to hold out {held} for validation")
    generator = torch.Generator().manual_seed(seed_from("held out", seed))
    order = torch.randperm(len(pairs), generator=generator).tolist()
    train, val = (
        Pairs([pairs.images[i] for i in part], [pairs.masks[i] for i in part], pairs.classes, pairs.reduce_zero_label)
        for part in (sorted(order[held:]), sorted(order[:held]))
    )
    return train, val


def _look_at(pairs: Pairs) -> None:
    """Raises `UserError` for what most of the set has wrong; a single bad file is told when it is its turn."""
    places = sorted({round(i) for i in np.linspace(0, len(pairs) - 1, LOOKED_AT)})
    told, values = [], set[int]()
    for i in places:
        try:
            values |= set(np.unique(pairs[i][1]).tolist())
        except BadImage as error:
            told.append(f"cannot use {pairs.where(i)}: {printable(str(error))}")
    if 2 * len(told) > len(places):
        raise UserError(f"{told[0]}.\n{len(told)} of {len(places)} images that were looked at cannot be used.")
    if values == {0, IGNORED} and not pairs.reduce_zero_label and len(pairs.classes) > 1:
        raise UserError(
            f"the masks beside {pairs.images[0].parent} hold 0 and 255 alone, as black-and-white ones do, but 255 is a "
            "pixel without a class. Write class numbers: 0, 1, ..."
        )
    if values == {IGNORED}:
        raise UserError(f"every pixel of {len(places)} masks beside {pairs.images[0].parent} is ignored: no class")


# ---------------------------------------------------------------- classes


def classes_file(root: Path) -> Path:
    for name in CLASS_FILES:
        if (root / name).is_file():
            return root / name
    raise UserError(f"{root} has no classes.txt: write one, with the name of one class per line, class 0 first")


def read_classes(file: Path) -> list[str]:
    """The names in classes.txt, or in ADE20K's objectInfo150.txt, a table whose last column is meant. `UserError`."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the classes: {file}: {first_line(error)}") from None
    if lines and lines[0].split("\t")[0] == "Idx":
        lines = [line.split("\t")[-1].split(",")[0].strip() for line in lines[1:]]  # the first of its synonyms
    if not lines:
        raise UserError(f"{file} names no class; write one per line, class 0 first")
    if "" in lines:
        raise UserError(f"{file}: line {lines.index('') + 1} is empty, and every line is a class")
    twice = next((name for i, name in enumerate(lines) if name in lines[:i]), None)
    if twice is not None:
        raise UserError(f"{file} names {printable(twice)} twice")
    return lines


def read_mask(file: Path) -> NDArray[np.int64]:
    """(H, W): the numbers in a mask's file. Raises `BadImage`.

    Grey of 1, 8, 16 or 32 bits gives its values, a palette its indices. Colours are no class numbers.
    """
    try:
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            image.load()
            mode, values = image.mode, np.asarray(image)
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or first_line(error)}") from None
    except Exception as error:  # a damaged file can make Pillow raise nearly anything
        raise BadImage(f"cannot be read: {first_line(error)}") from None
    if mode not in ("1", "L", "P", "I") and not mode.startswith("I;16"):
        raise BadImage(f"is a picture of mode {mode}; a mask has one channel, whose values are class numbers")
    return values.astype(np.int64)


def as_classes(values: NDArray[np.int64], classes: Sequence[str], reduce_zero_label: bool) -> Mask:
    """Classes from 0, and `IGNORED` for 255 (65535 in 16 bits) and, if 0 is "other", for 0. Raises `BadImage`.

    A value beyond the class list is never ignored silently: it would hide a wrong list.
    """
    first, beyond = int(reduce_zero_label), len(classes) + reduce_zero_label
    ignored = (values == IGNORED) | (values == 65535) | (values < first) & (values >= 0)
    bad = values[~ignored & ((values < first) | (values >= beyond))]
    if bad.size:
        few = ", ".join(map(str, np.unique(bad)[:5]))
        raise BadImage(
            f"{bad.size} of {values.size} pixels hold values beyond the class list, such as {few}: {len(classes)} "
            f"classes have {first} to {beyond - 1}, and 255 is ignored"
            + ("; if 0 is `other` and classes count from 1, set reduce_zero_label" * (int(bad.max()) == len(classes)))
        )
    return np.where(ignored, IGNORED, values - first).astype(np.uint8)
