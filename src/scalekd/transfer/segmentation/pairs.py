"""Opens images with masks: ADE20K's format, or a folder of images and a folder of masks. See docs/how-to/transfer.md.

A mask has the class of every pixel; `IGNORED` marks a pixel without a class, which is not trained on or counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from scalekd.common.errors import UserError, first_line
from scalekd.common.seeds import seed_from
from scalekd.common.text import printable
from scalekd.data.images import BadImage, decode, decode_values, read_file
from scalekd.data.sources.folders import class_folders, images_below
from scalekd.data.sources.names import LeftOut, split_of

IGNORED = 255
MOST_CLASSES = 255  # a mask has 8 bits, and one value means ignored
MASKS = ("annotations", "masks", "labels")  # possible names of the mask folder
CLASS_FILES = ("classes.txt", "objectInfo150.txt")  # the second is ADE20K's own
SAMPLED = 8  # pairs read when a set is opened, enough to find problems that all pairs have

Mask = NDArray[np.uint8]  # (H, W): class, or IGNORED


@dataclass(frozen=True)
class Pairs:
    """Image files and their mask files, in the same order. `pairs[i]` reads both. Picklable."""

    images: Sequence[Path]
    masks: Sequence[Path]
    classes: Sequence[str]
    reduce_zero_label: bool = False
    left_out: LeftOut = field(default_factory=dict)  # files without use, by reason
    chosen: str = ""  # how these pairs were chosen for their part

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Image.Image, Mask]:
        """The image, rotated upright, of mode L or RGB, and its mask. Raises `BadImage`."""
        image = decode(read_file(str(self.images[i])))
        try:
            mask = self._mask(i)
        except BadImage as error:
            raise BadImage(f"its mask {self.masks[i]}: {error}") from None
        if mask.shape != image.size[::-1]:
            size = "x".join(map(str, mask.shape[::-1]))
            raise BadImage(
                f"its mask {self.masks[i]} has {size} pixels, the image {image.width}x{image.height}"
                + " after EXIF rotation" * (mask.shape == image.size)
            )
        return image, mask

    def _mask(self, i: int) -> Mask:
        return as_classes(read_mask(self.masks[i]), self.classes, self.reduce_zero_label)

    def labels(self, i: int) -> list[int]:
        """The classes in mask `i`; none if it cannot be read."""
        try:
            return [int(value) for value in np.unique(self._mask(i)) if value != IGNORED]
        except BadImage:
            return []

    def where(self, i: int) -> str:
        """The path of image `i`."""
        return str(self.images[i])


def open_segments(
    root: Path,
    *,
    classes: Path | None = None,
    reduce_zero_label: bool = False,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> tuple[Pairs, Pairs]:
    """(training, validation) pairs of a folder.

    Args:
        root: contains `images/training`, `annotations/training`, `images/validation`, `annotations/validation` as in
            ADE20K, or `train/images`, `train/masks` and so on (`MASKS` and `SPLITS` list the names). Without parts, only
            `images` and `masks`, a seeded `val_fraction` of the pairs is held out for validation.
        classes: a file with one class name per line, class 0 first; by default `root/classes.txt`, or ADE20K's list.
        reduce_zero_label: in the masks, 0 means "other", which is ignored, and classes start at 1, as in ADE20K.

    Raises:
        UserError: for a folder in no such layout, and for anything wrong with the classes or most pairs.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder")
    names = read_classes(classes or classes_file(root))
    folders = {part: part_folders(root, part) for part in ("train", "val", "test")}
    train, val = folders["train"], folders["val"]
    if train and val:
        return open_pairs(*train, names, reduce_zero_label), open_pairs(*val, names, reduce_zero_label)
    if train and folders["test"]:  # test images choose no checkpoint
        return _held_out(open_pairs(*train, names, reduce_zero_label), val_fraction, seed)
    whole = next(((root / "images", root / m) for m in MASKS if (root / m).is_dir()), None)
    if whole is None or not whole[0].is_dir() or any(folders.values()):
        raise UserError(
            f"{root} has no images with masks; it needs images/training, annotations/training, images/validation and "
            "annotations/validation, or train/images, train/masks, val/images and val/masks, or only images and masks"
        )
    return _held_out(open_pairs(*whole, names, reduce_zero_label), val_fraction, seed)


def open_pairs(images: Path, masks: Path, classes: Sequence[str], reduce_zero_label: bool = False) -> Pairs:
    """All images of a folder and its sub-folders with their masks, matched by name without extension.

    Reads a few pairs to find problems that all of them have. Raises `UserError`.
    """
    most = MOST_CLASSES - reduce_zero_label
    if len(classes) > most:
        raise UserError(f"{len(classes)} classes are too many: masks have 8 bits, for at most {most} classes")
    left_out: LeftOut = {}
    image_files, mask_files = _by_name(images, left_out), _by_name(masks, {})
    _expect_partners(image_files, mask_files, images, masks, "masks")
    _expect_partners(mask_files, image_files, masks, images, "images")
    lossy = next((file for file in mask_files.values() if file.suffix.lower() in (".jpg", ".jpeg", ".webp")), None)
    if lossy is not None:
        raise UserError(f"{lossy}: {lossy.suffix} does not preserve the values of a mask; save masks as .png")
    names = sorted(image_files)
    files = [image_files[n] for n in names], [mask_files[n] for n in names]
    pairs = Pairs(*files, list(classes), reduce_zero_label, left_out)
    _check_sample(pairs)
    return pairs


def _expect_partners(
    files: dict[str, Path], partners: dict[str, Path], folder: Path, other_folder: Path, kind: str
) -> None:
    """Raises `UserError` for files without a partner of the same name. kind: of the partners."""
    alone = sorted(files.keys() - partners.keys())
    if alone:
        raise UserError(
            f"{len(alone)} of {len(files)} files in {folder} have no {kind} of the same name in {other_folder}, such as "
            f"{files[alone[0]].name}; add them, or remove those files"
        )


def _by_name(folder: Path, left_out: LeftOut) -> dict[str, Path]:
    """The images in a folder and below, by path without extension. Raises `UserError`."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    files: dict[str, Path] = {}
    for file in map(Path, images_below(folder, left_out)):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise UserError(f"{files[name]} and {file.name} have the same name without extension; remove one of them")
        files[name] = file
    if not files:
        raise UserError(f"{folder} contains no images")
    return files


def part_folders(root: Path, part: str) -> tuple[Path, Path] | None:
    """The folders of images and masks of a part, `train`, `val` or `test`, such as images/training or training/images.

    None if missing. Names of parts are those of `scalekd.data.sources.names.SPLITS`, in any case.
    """
    images = root / "images"
    named = {name for folder in (root, images) if folder.is_dir() for name in class_folders(folder)}
    for name in sorted((name for name in named if split_of(name) == part), key=len, reverse=True):
        for masks in MASKS:
            for pair in ((images / name, root / masks / name), (root / name / "images", root / name / masks)):
                if all(folder.is_dir() for folder in pair):
                    return pair
    return None


def _held_out(pairs: Pairs, share: float, seed: int) -> tuple[Pairs, Pairs]:
    held = max(1, round(len(pairs) * share))
    if held >= len(pairs):
        raise UserError(f"{len(pairs)} images with masks are too few to hold out {held} for validation; add images")
    generator = torch.Generator().manual_seed(seed_from("held out", seed))
    order = torch.randperm(len(pairs), generator=generator).tolist()
    train, val = (
        replace(pairs, images=[pairs.images[i] for i in part], masks=[pairs.masks[i] for i in part])
        for part in (sorted(order[held:]), sorted(order[:held]))
    )
    return train, replace(val, chosen=f"held out: {share:.0%} of the images, seed {seed}", left_out={})


def _check_sample(pairs: Pairs) -> None:
    """Raises `UserError` for problems of most pairs; a single bad pair is an error when it is read."""
    indices = sorted({round(i) for i in np.linspace(0, len(pairs) - 1, SAMPLED)})
    errors, values = [], set[int]()
    for i in indices:
        try:
            values |= set(np.unique(pairs[i][1]).tolist())
        except BadImage as error:
            errors.append(f"cannot use {pairs.where(i)}: {printable(str(error))}")
    if 2 * len(errors) > len(indices):
        raise UserError(f"{errors[0]}.\n{len(errors)} of {len(indices)} sampled images cannot be used.")
    folder = pairs.masks[0].parent
    if values == {0, IGNORED} and not pairs.reduce_zero_label and len(pairs.classes) > 1:
        raise UserError(
            f"the masks in {folder} only have the values 0 and 255, like black-and-white images, but 255 marks a pixel "
            "without a class. Write class numbers: 0, 1, ..."
        )
    if values == {IGNORED}:
        raise UserError(f"every pixel of {len(indices)} sampled masks in {folder} is ignored; use masks with classes")


# ---------------------------------------------------------------- classes


def classes_file(root: Path) -> Path:
    """The file in a folder that lists its classes. Raises `UserError` if there is none."""
    for name in CLASS_FILES:
        if (root / name).is_file():
            return root / name
    raise UserError(f"{root} has no classes.txt; write one with one class name per line, class 0 first")


def read_classes(file: Path) -> list[str]:
    """Class names in classes.txt, or in the last column of ADE20K's objectInfo150.txt. Raises `UserError`."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the class names in {file}: {first_line(error)}") from None
    if lines and lines[0].split("\t")[0] == "Idx":
        lines = [line.split("\t")[-1].split(",")[0].strip() for line in lines[1:]]  # the first of its synonyms
    if not lines:
        raise UserError(f"{file} is empty; write one class name per line, class 0 first")
    if "" in lines:
        raise UserError(f"{file}: line {lines.index('') + 1} is empty, but every line is a class; remove it")
    twice = next((name for i, name in enumerate(lines) if name in lines[:i]), None)
    if twice is not None:
        raise UserError(f"{file} lists {printable(twice)} twice; class names must differ")
    return lines


def read_mask(file: Path) -> NDArray[np.int64]:
    """(H, W): the values in a mask file, upright as its image. Raises `BadImage`."""
    try:
        return decode_values(read_file(str(file)))
    except BadImage as error:
        raise BadImage(str(error) if str(error).startswith("is an image") else f"cannot be read: {error}") from None


def as_classes(values: NDArray[np.int64], classes: Sequence[str], reduce_zero_label: bool) -> Mask:
    """Mask values to classes from 0, and to `IGNORED` for 255, 65535 (16 bits) and, with `reduce_zero_label`, 0.

    A value beyond the class list raises `BadImage`: ignoring it would hide a wrong list.
    """
    first, beyond = int(reduce_zero_label), len(classes) + reduce_zero_label
    ignored = (values == IGNORED) | (values == 65535) | (values < first) & (values >= 0)
    bad = values[~ignored & ((values < first) | (values >= beyond))]
    if bad.size:
        few = ", ".join(map(str, np.unique(bad)[:5]))
        raise BadImage(
            f"{bad.size} of {values.size} pixels have values beyond the class list, such as {few}: {len(classes)} "
            f"classes use {first} to {beyond - 1}, and 255 is ignored"
            + ("; if 0 is `other` and classes start at 1, set reduce_zero_label" * (int(bad.max()) == len(classes)))
        )
    return np.where(ignored, IGNORED, values - first).astype(np.uint8)
