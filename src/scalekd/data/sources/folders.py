"""A folder with one sub-folder of images per class."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from PIL import Image

from scalekd.common.errors import UserError, did_you_mean, nearest
from scalekd.common.text import printable
from scalekd.data.images import decode, is_image, read_file

# What names a folder on the command line, for those who have left it out: a recipe's own is a placeholder.
OPTIONS = {
    "data.train": " --data names the labelled images: a folder with one sub-folder per class.",
    "data.val": " --val names some hundred labelled images to validate on: a folder with one sub-folder per class.",
    "data.unlabelled": " --unlabelled names the images without labels: a folder, at any depth.",
}


class Folder:
    def __init__(self, text: str, key: str):
        root = Path(text).expanduser()
        if not root.is_dir():
            beside = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
            hint = did_you_mean(root.name, beside) + OPTIONS.get(key, "") or nearest(root.name, beside)
            if root.suffix == ".tar" and root.is_file():
                hint = f" For an archive of class folders write tar:{text}, for WebDataset shards wds:{text}."
            raise UserError(f"{key}: no folder {text}.{printable(hint)}")
        self.classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not self.classes:
            raise UserError(f"{key}: {text} has no class folders; it needs one sub-folder of images per class")
        found = [images_below(root / name) for name in self.classes]
        refuse_empty([name for name, files in zip(self.classes, found) if not files], text, key)
        self.files = [file for files in found for file in files]
        self.targets = [target for target, files in enumerate(found) for _ in files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return decode(read_file(self.files[i])), self.targets[i]

    def where(self, i: int) -> str:
        return printable(self.files[i])

    def identity(self, i: int) -> str:
        return real(self.files[i])


def real(file: str) -> str:
    """The file's path without links in its folders, which are looked at once each."""
    folder, name = os.path.split(file)
    return os.path.join(_real_folder(folder), name)


@functools.lru_cache(maxsize=100_000)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def images_below(folder: Path) -> list[str]:
    found = [Path(place) / name for place, _, names in os.walk(folder) for name in names if is_image(name)]
    return [str(path) for path in sorted(found)]


def refuse_empty(classes: list[str], text: str, key: str) -> None:
    if classes:
        raise UserError(
            f"{key}: {text} has class folders without images: {printable(', '.join(classes[:5]))}. "
            "Fill or remove them, so that class indices mean what you think."
        )
