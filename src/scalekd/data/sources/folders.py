"""A folder with one sub-folder of images per class."""

from __future__ import annotations

import os
from pathlib import Path

from scalekd.common.errors import UserError, did_you_mean, nearest
from scalekd.common.text import printable
from scalekd.data.images import is_image

from .in_files import InFiles
from .names import (
    HIDDEN,
    LOOPS,
    LeftOut,
    are_splits,
    is_hidden,
    leave_out,
    refuse_mixed,
    split_of,
    why_left_out,
)

BESIDE = "files beside the class folders"

# Hints for a missing folder: the folders in shipped recipes are placeholders.
HINTS = {
    "data.train": " Set `data` to a folder of labelled images with one sub-folder per class.",
    "data.val": " Set data.val to a folder of some hundred labelled images with one sub-folder per class.",
    "data.unlabelled": " Set data.unlabelled to a folder of images, at any depth.",
}


class Folder(InFiles):
    """Images in class folders; classes in alphabetical order, images of a class at any depth below its folder."""

    def __init__(self, text: str, key: str):
        root = Path(text).expanduser()
        if not root.is_dir():
            siblings = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
            hint = did_you_mean(root.name, siblings) + HINTS.get(key, "") or nearest(root.name, siblings)
            if root.suffix == ".tar" and root.is_file():
                hint = f" For an archive of class folders write tar:{text}, for WebDataset shards write wds:{text}."
            raise UserError(f"{key}: no folder {text}.{printable(hint)}")
        self.left_out: LeftOut = {}
        self.classes = class_folders(root, self.left_out)
        if not self.classes:
            raise UserError(f"{key}: {text} has no class folders; it must have one sub-folder of images per class")
        images = [images_below(root / name, self.left_out, root) for name in self.classes]
        _refuse_split_folders(root, self.classes, images, key)
        reject_empty([name for name, files in zip(self.classes, images) if not files], text, key)
        self.files = [file for files in images for file in files]
        self.targets = [target for target, files in enumerate(images) for _ in files]


def class_folders(root: Path, left_out: LeftOut | None = None) -> list[str]:
    """The names of the sub-folders that are neither hidden nor a system's, sorted. Counts the others in `left_out`."""
    left = {} if left_out is None else left_out
    names = []
    for path in sorted(root.iterdir()):
        if not path.is_dir():
            leave_out(left, HIDDEN if is_hidden(path.name) else BESIDE, path.name)
        elif is_hidden(path.name):
            images_below(path, left, root)
        else:
            names.append(path.name)
    return names


def any_image(folder: Path) -> bool:
    """Whether there is an image directly in a folder."""
    with os.scandir(folder) as entries:
        return any(is_image(entry.name) for entry in entries)


def _refuse_split_folders(root: Path, classes: list[str], images: list[list[str]], key: str) -> None:
    """Raises `UserError` if folders named as splits would be classes, or if classes mix splits."""
    flat = [name for name in classes if split_of(name) and any_image(root / name)]
    if found := are_splits(classes, flat):
        parts = {split_of(name): root / name for name in reversed(found)}
        fix = f"Set {key} to {parts.get('train', root / found[0])}"
        if key == "data.train" and "val" in parts:
            fix += f" and data.val to {parts['val']}"
        raise UserError(
            f"{key}: {root} has folders named as splits, not as classes: {printable(', '.join(found))}. {printable(fix)}; "
            "each must have one sub-folder per class"
        )
    if len(classes) == 1:  # refused by `open_split`, with a better hint
        return
    below = {os.path.dirname(os.path.relpath(file, root)) for files in images for file in files}
    refuse_mixed(sorted(below), str(root), key)


def images_below(folder: Path, left_out: LeftOut | None = None, root: Path | None = None) -> list[str]:
    """All image files in a folder, at any depth, sorted. Links to folders are followed; each folder is read once.

    Args:
        folder: where to look.
        left_out: counts the files that are left out.
        root: the folder that names in `left_out` are relative to, and below which a hidden part of a path counts;
            `folder` by default.
    """
    left = {} if left_out is None else left_out
    images: list[str] = []
    seen: set[tuple[int, int]] = set()
    todo = [(str(folder), os.path.relpath(folder, root) if root else "")]
    while todo:
        parent, name = todo.pop()
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            leave_out(left, LOOPS, name)
            continue
        seen.add((status.st_dev, status.st_ino))
        links: list[tuple[str, str]] = []
        for entry in _entries(parent, name, left):
            below = f"{name}/{entry.name}" if name else entry.name
            if entry.is_dir():
                (links if entry.is_symlink() else todo).append((entry.path, below))
            elif reason := why_left_out(below):
                leave_out(left, reason, below)
            else:
                images.append(entry.path)
        todo = links + todo  # folders before links to them
    return [str(path) for path in sorted(map(Path, images))]


def _entries(folder: str, name: str, left: LeftOut) -> list[os.DirEntry[str]]:
    """What is in a folder, by name; nothing if it may not be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except PermissionError:
        leave_out(left, "folders that may not be read", name or folder)
        return []


def reject_empty(classes: list[str], text: str, key: str) -> None:
    """Raises `UserError` if there are class folders without images."""
    if classes:
        raise UserError(
            f"{key}: {text} has class folders without images: {printable(', '.join(classes[:5]))}. "
            "Fill or remove them, because every folder takes a class index."
        )
