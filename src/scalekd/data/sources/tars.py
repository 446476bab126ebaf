"""Uncompressed tar archives, indexed from their headers and read in place.

Any process can read the images in any order. Nothing is ever unpacked.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from scalekd.common.errors import UserError, first_line, nearest
from scalekd.common.text import printable

from .archived import Archived
from .content import Place
from .folders import reject_empty
from .names import LeftOut, is_hidden, leave_out, refuse_mixed, refuse_splits, told, why_left_out

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
BLOCK = 512


class Tar(Archived):
    """Class folders in one archive. The class of an image is the folder directly above it."""

    def __init__(self, text: str, key: str):
        self.archive = Path(text).expanduser()
        places, folders = index(self.archive, key)
        self.left_out: LeftOut = {}
        self.names = sorted(images_of(places, self.left_out), key=lambda name: (_class(_parent(name)), name))
        if not self.names:
            raise UserError(f"{key}: {text} has no images{told(self.left_out)}")
        if not _parent(self.names[0]):
            raise UserError(f"{key}: {printable(self.names[0])} in {text} is not in a class folder")
        parents = list(dict.fromkeys(_parent(name) for name in self.names))
        refuse_mixed(parents, text, key)
        refuse_splits(map(_class, parents), text, key)
        for a, b in pairwise(parents):
            if _class(a) == _class(b):
                raise UserError(
                    f"{key}: {text} has the class {printable(_class(a))} in two folders, {printable(a)} and "
                    f"{printable(b)}. Use separate archives for training and validation images."
                )
        above = {"/".join(parts[:i]) for parts in (p.split("/") for p in parents) for i in range(1, len(parts) + 1)}
        reject_empty(sorted(f for f in folders - above if not is_hidden(f)), text, key)
        self.classes = [_class(parent) for parent in parents]
        number = {parent: i for i, parent in enumerate(parents)}
        self.places = [places[name] for name in self.names]
        self.targets = [number[_parent(name)] for name in self.names]


def images_of(names: Iterable[str], left_out: LeftOut) -> list[str]:
    """The images among the files of an archive; the others are counted in `left_out`."""
    images = []
    for name in names:
        if reason := why_left_out(name):
            leave_out(left_out, reason, name)
        else:
            images.append(name)
    return images


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def _class(parent: str) -> str:
    return parent.rpartition("/")[2]


def index(archive: Path, key: str) -> tuple[dict[str, Place], set[str]]:
    """The position of each file in an archive, by name, and the set of its folders.

    Raises `UserError` if the archive is damaged, compressed, or has anything but plain files and folders.
    """
    places: dict[str, Place] = {}
    folders: set[str] = set()
    with _opened(archive, key) as file:
        for member in _members(file, archive, key):
            name = _safe_name(member, archive, key)
            if member.isdir():
                folders |= {name} - {""}
                continue
            if name in places:
                raise UserError(
                    f"{key}: {printable(name)} is in {archive} twice; create the archive again from the files"
                )
            places[name] = Place(str(archive), member.offset_data, member.size)
    return places, folders


def _opened(archive: Path, key: str) -> BinaryIO:
    try:
        file = open(archive, "rb", buffering=2 * BLOCK)  # noqa: SIM115 - the caller closes it; a small buffer, since only headers are read
    except OSError as error:
        siblings = [p.name for p in archive.parent.glob("*.tar")] if archive.parent.is_dir() else []
        hint = nearest(archive.name, siblings) if siblings else ""
        raise UserError(f"{key}: cannot open {archive}: {error.strerror}.{printable(hint)}") from None
    start = file.read(8)
    for magic, name in COMPRESSED.items():
        if start.startswith(magic):
            file.close()
            raise UserError(
                f"{key}: {archive} is compressed ({name}), so single images cannot be read; decompress it. "
                "That takes little space, because images are compressed themselves."
            )
    file.seek(0)
    return file


def _members(file: BinaryIO, archive: Path, key: str) -> Iterator[tarfile.TarInfo]:
    """All members of an archive. Raises `UserError` if the end mark is missing, which tarfile does not check."""
    complete = last = "its beginning"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            # next() fails if the previous member is incomplete and, in Python 3.10, if there is no member at all
            while tar.offset and (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it would keep them all in memory
                complete, last = last, member.name
                yield member
            complete, end = last, tar.offset
        file.seek(end)
        mark = file.read(2 * BLOCK)
        damage = "has a damaged header" if any(mark) else "is cut off" if len(mark) < BLOCK else ""
        while not damage and (rest := file.read(2**20)):
            damage = "has data after its end mark, as joined archives have," if any(rest) else ""
    # the last three for headers that announce a name of exabytes, or long chains of headers
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        damage = f"is damaged or cut off ({printable(first_line(error))})"
    if damage:
        raise UserError(f"{key}: {archive} {damage} after {printable(complete)}; create or copy it again")


def _safe_name(member: tarfile.TarInfo, archive: Path, key: str) -> str:
    """The name of a member without `.` parts. Raises `UserError` unless it is a plain file or folder inside the archive."""
    parts = member.name.split("/")
    problem = ""
    if member.name.startswith("/") or ".." in parts or "\\" in member.name or "\0" in member.name:
        problem = "a path that leads outside the archive"
    elif not (member.isreg() or member.isdir()) or member.issparse() or member.size < 0:
        problem = "a link or a device" if not member.isreg() else "a sparse file"
    if problem:
        raise UserError(
            f"{key}: {printable(member.name)} in {archive} is {problem}; nothing was read. "
            "Create the archive again from plain files and folders."
        )
    return "/".join(part for part in parts if part not in ("", "."))
