"""Bytes, sizes and stamps of files, to find equal images and to notice that images changed under the same names."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from scalekd.data.images import MOST_BYTES, BadImage, read_file
from scalekd.data.reading import steadily


def real(file: str) -> str:
    """The path of a file with links in its folders resolved; results are cached per folder."""
    folder, name = os.path.split(file)
    return os.path.join(_real_folder(folder), name)


@functools.lru_cache(maxsize=100_000)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


class Place(NamedTuple):
    """The position of a file in an archive."""

    archive: str
    offset: int  # bytes
    size: int

    def read(self) -> bytes:
        """The bytes of the file. Raises `BadImage`, and `Outage` if the archive cannot be read.

        Opens the archive each time, so that processes share no file handle and cannot run out of them.
        """
        if self.size > MOST_BYTES:
            raise BadImage(f"it has {self.size / 1e9:,.1f} GB, more than {MOST_BYTES / 1e9:,.1f} GB")
        data = steadily(self._bytes, self.archive, alone=False)
        if len(data) < self.size:
            raise BadImage("the archive is shorter than when it was opened")
        return data

    def _bytes(self) -> bytes:
        with open(self.archive, "rb", buffering=0) as file:
            file.seek(self.offset)
            return file.read(self.size)

    def identity(self) -> tuple[str, int]:
        """As `Source.identity`."""
        return real(self.archive), self.offset


def content_of(place: str | Place) -> bytes:
    """The bytes of a file on disk or in an archive. Raises `BadImage`."""
    return place.read() if isinstance(place, Place) else read_file(place)


def sizes_of(places: Sequence[str | Place]) -> list[int]:
    """The number of bytes of each file; -1 if it cannot be read. Reads no file, but asks the file system for each."""
    return [place.size if isinstance(place, Place) else _size(place) for place in places]


def _size(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return -1


def stamps_of(places: Sequence[str | Place]) -> Iterator[str]:
    """A text for each file that changes when the file is changed: size and time of change; of an archive, those of the
    archive, with the position in it."""
    archive = functools.cache(stamp)
    for place in places:
        yield f"{archive(place.archive)} {place.offset} {place.size}" if isinstance(place, Place) else stamp(place)


def stamp(file: str | Path) -> str:
    """Size and time of change of a file, or of the file that a link names."""
    try:
        status = os.stat(file)
    except OSError as error:
        return str(error.strerror)
    return f"{status.st_size} {status.st_mtime_ns}"
