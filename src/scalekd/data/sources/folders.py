"""A folder with one sub-folder of images per class."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from PIL import Image

from scalekd.common.errors import UserError, did_you_mean, nearest
from scalekd.common.text import printable
from scalekd.data.images import decode, is_image, read_file

# Hints for a missing folder: the folders in shipped recipes are placeholders.
HINTS = {
    "data.train": " Set `data` to a folder of labelled images with one sub-folder per class.",
    "data.val": " Set data.val to a folder of some hundred labelled images with one sub-folder per class.",
    "data.unlabelled": " Set data.unlabelled to a folder of images, at any depth.",
}


class Folder:
    """Images in class folders; classes in alphabetical order, images of a class at any depth below its folder."""

    def __init__(self, text: str, key: str):
        root = Path(text).expanduser()
        if not root.is_dir():
            siblings = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
            hint = did_you_mean(root.name, siblings) + HINTS.get(key, "") or nearest(root.name, siblings)
            if root.suffix == ".tar" and root.is_file():
                hint = f" For an archive of class folders write tar:{text}, for WebDataset shards write wds:{text}."
            raise UserError(f"{key}: no folder {text}.{printable(hint)}")
        self.classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not self.classes:
            raise UserError(f"{key}: {text} has no class folders; it must have one sub-folder of images per class")
        images = [images_below(root / name) for name in self.classes]
        reject_empty([name for name, files in zip(self.classes, images) if not files], text, key)
        self.files = [file for files in images for file in files]
        self.targets = [target for target, files in enumerate(images) for _ in files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return decode(read_file(self.files[i])), self.targets[i]

    def where(self, i: int) -> str:
        return printable(self.files[i])

    def identity(self, i: int) -> str:
        return real(self.files[i])


def real(file: str) -> str:
    """The path of a file with links in its folders resolved; results are cached per folder."""
    folder, name = os.path.split(file)
    return os.path.join(_real_folder(folder), name)


@functools.lru_cache(maxsize=100_000)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def images_below(folder: Path) -> list[str]:
    """All image files in a folder, at any depth, sorted."""
    images = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names if is_image(name)]
    return [str(path) for path in sorted(images)]


def reject_empty(classes: list[str], text: str, key: str) -> None:
    """Raises `UserError` if there are class folders without images."""
    if classes:
        raise UserError(
            f"{key}: {text} has class folders without images: {printable(', '.join(classes[:5]))}. "
            "Fill or remove them, because every folder takes a class index."
        )
