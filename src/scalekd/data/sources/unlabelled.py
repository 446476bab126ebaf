"""Sources of images without labels, whose target is `UNLABELLED`, and their union with a labelled source."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from scalekd.common.errors import UserError
from scalekd.common.text import printable
from scalekd.data.images import decode, is_image, read_file

from .folders import HINTS, images_below, real
from .shards import is_sample_image, shard_paths
from .tars import Place, index

if TYPE_CHECKING:
    from .source import Source

UNLABELLED = -1


class Loose:
    """Image files on disk or in archives, at any depth. Folder names are ignored."""

    def __init__(self, places: Sequence[str | Place], names: Sequence[str]):
        self.places, self.names = places, names
        self.classes: Sequence[str] = ()
        self.targets = [UNLABELLED] * len(places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        place = self.places[i]
        return decode(place.read() if isinstance(place, Place) else read_file(place)), UNLABELLED

    def where(self, i: int) -> str:
        return printable(self.names[i])

    def identity(self, i: int) -> Hashable:
        place = self.places[i]
        return place.identity() if isinstance(place, Place) else real(place)


class WithoutLabels:
    """A labelled source without its labels."""

    def __init__(self, source: Source):
        self.source = source
        self.classes: Sequence[str] = ()
        self.targets = [UNLABELLED] * len(source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.source[i][0], UNLABELLED

    def where(self, i: int) -> str:
        return self.source.where(i)

    def identity(self, i: int) -> Hashable:
        return self.source.identity(i)


class Joined:
    """The images of a labelled source, followed by those of an unlabelled one."""

    def __init__(self, labelled: Source, unlabelled: Source):
        self.labelled, self.unlabelled = labelled, unlabelled
        self.classes = labelled.classes
        self.targets = [*labelled.targets, *unlabelled.targets]

    def __len__(self) -> int:
        return len(self.labelled) + len(self.unlabelled)

    def part(self, i: int) -> tuple[Source, int]:
        """The source of image i, and its index there."""
        return (self.labelled, i) if i < len(self.labelled) else (self.unlabelled, i - len(self.labelled))

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        source, number = self.part(i)
        return source[number]

    def where(self, i: int) -> str:
        source, number = self.part(i)
        return source.where(number)

    def identity(self, i: int) -> Hashable:
        source, number = self.part(i)
        return source.identity(number)


def stored(source: Source, i: int) -> str | Place | None:
    """The file of image i, or its place in an archive; None if the source has neither for each image."""
    if isinstance(source, Joined):
        return stored(*source.part(i))
    if isinstance(source, WithoutLabels):
        return stored(source.source, i)
    places: Sequence[str | Place] | None = getattr(source, "files", None) or getattr(source, "places", None)
    return places[i] if places else None


def loose_files(text: str, key: str) -> Loose:
    """All images in a folder, at any depth. Raises `UserError` if there are none."""
    root = Path(text).expanduser()
    if not root.is_dir():
        raise UserError(f"{key}: no folder {text}.{HINTS.get(key, '')}")
    files = images_below(root)
    if not files:
        raise UserError(f"{key}: {text} has no images")
    return Loose(files, files)


def loose_members(text: str, key: str, shards: bool) -> Loose:
    """All images in one archive, or with `shards` in all shards that `text` names. Raises `UserError` if there are none."""
    is_wanted = is_sample_image if shards else is_image
    archives = shard_paths(text, key) if shards else [Path(text).expanduser()]
    images = [
        (place, f"{name} in {place.archive}")
        for archive in archives
        for name, place in index(archive, key)[0].items()
        if is_wanted(name)
    ]
    if not images:
        raise UserError(f"{key}: {text} has no images")
    return Loose([place for place, _ in images], [name for _, name in images])
