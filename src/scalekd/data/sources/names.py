"""What the names of folders and files mean: splits, hidden and system files, images; and what was left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from scalekd.common.errors import UserError
from scalekd.common.text import printable
from scalekd.data.images import is_image

KINDS = (
    "folder",
    "tar",
    "wds",
    "idx",
    "hf",
    "torchvision",
    "fashion-mnist",
)  # in front of a colon; of tables: table/text.py
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "evaluation": "val",
    "test": "test",
    "testing": "test",
}
# what may stand before and behind such a name: train_images, images-val, testset, val2017
DECORATED = re.compile(
    r"(?:(?:images?|imgs?|data|dataset|set)[ _-]?)?([a-z]+?)(?:[ _-]?(?:images?|imgs?|data|dataset|set|split|(?:19|20)\d\d))?"
)
SYSTEM = {"__macosx", "@eadir", "@tmp", "#recycle", "$recycle.bin", "system volume information", "lost+found",
          "thumbs.db", "desktop.ini", "__pycache__"}  # fmt: skip

HIDDEN = "hidden or system files"
NOT_IMAGES = "files without an image extension"
LOOPS = "links to folders that were read already"

LeftOut = dict[str, dict[str, Any]]  # reason: {"count": number of files, "example": name of the first}


def split_of(name: str) -> str | None:
    """`train`, `val` or `test` for a name of a split in any case, such as Valid or train_images; else None."""
    found = DECORATED.fullmatch(name.lower())
    return SPLITS.get(found[1]) if found else None


def is_hidden(path: str) -> bool:
    """Whether a part of a relative path is hidden (`.git`, `._1.jpg`) or made by a system (`__MACOSX`, `Thumbs.db`)."""
    return any(part.startswith(".") or part.lower() in SYSTEM for part in path.split("/"))


def why_left_out(path: str) -> str:
    """The reason why a file with this relative path is no image of a source, or ""."""
    if is_hidden(path):
        return HIDDEN
    return "" if is_image(path) else NOT_IMAGES


def leave_out(left: LeftOut, reason: str, example: str) -> None:
    """Counts a file that is left out."""
    entry = left.setdefault(reason, {"count": 0, "example": printable(example)})
    entry["count"] += 1


def told(left: Mapping[str, dict[str, Any]]) -> str:
    """What was left out, for a message that a source has no images; "" if nothing was."""
    parts = [f"{entry['count']} {reason}, such as {entry['example']}" for reason, entry in left.items()]
    return f"; left out: {'; '.join(parts)}" if parts else ""


def merged(several: Iterable[Mapping[str, dict[str, Any]]]) -> LeftOut:
    """The sum of several counts."""
    total: LeftOut = {}
    for left in several:
        for reason, entry in left.items():
            known = total.setdefault(reason, {"count": 0, "example": entry["example"]})
            known["count"] += entry["count"]
    return total


def are_splits(names: Iterable[str], holds_images: Iterable[str] = ()) -> list[str]:
    """Which of a source's class names are splits.

    A single `train` among three or more names is a class, as in CIFAR-100 and Pascal VOC, if it has images directly in
    its folder: `holds_images` lists the names that do.
    """
    names = list(names)
    found = [name for name in names if split_of(name)]
    vehicle = [name.lower() for name in found] == ["train"] and found[0] in holds_images and len(names) > 2
    return [] if vehicle else found


def refuse_splits(names: Iterable[str], text: str, key: str) -> None:
    """Raises `UserError` if the classes of archives or shards are named as splits."""
    if found := are_splits(names, names):
        raise UserError(
            f"{key}: {text} has {'classes' if len(found) > 1 else 'a class'} named {printable(' and '.join(found[:3]))}, "
            "which are names of splits, not of classes. Make one source for each split, with the classes in it"
        )


def splits_in(paths: Iterable[str]) -> dict[str, str]:
    """The splits that parts of these paths name, each with the first such path."""
    found: dict[str, str] = {}
    for path in paths:
        for part in path.split("/"):
            if split := split_of(part):
                found.setdefault(split, path)
    return found


def refuse_mixed(paths: Iterable[str], text: str, key: str) -> None:
    """Raises `UserError` if the paths belong to two splits: one source must not mix them."""
    found = splits_in(paths)
    if len(found) > 1:
        (first, a), (second, b) = list(found.items())[:2]
        raise UserError(
            f"{key}: {text} mixes the splits {first} and {second}: {printable(a)}, {printable(b)}. "
            "Name one source for each split"
        )


def words_of(name: str) -> str:
    """The words in a file name as a path, so that `splits_in` finds them: `in1k-val-00.tar` -> `in/k/val/tar`."""
    return "/".join(re.findall(r"[A-Za-z]+", name))
