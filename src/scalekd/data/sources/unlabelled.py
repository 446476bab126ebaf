"""Sources of images without labels, whose target is `UNLABELLED`, and their union with a labelled source."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from scalekd.common.errors import UserError
from scalekd.common.text import printable
from scalekd.data.images import decode
from scalekd.data.targets import Target

from .content import Place, content_of, real, sizes_of, stamps_of
from .folders import HINTS, images_below
from .names import LeftOut, merged, told
from .shards import sample_images, shard_paths
from .tars import images_of, index

if TYPE_CHECKING:
    from .source import Source

UNLABELLED = -1


class Loose:
    """Image files on disk or in archives, at any depth. Folder names are ignored."""

    def __init__(self, places: Sequence[str | Place], names: Sequence[str], left_out: LeftOut | None = None):
        self.places, self.names, self.left_out = places, names, left_out or {}
        self.classes: Sequence[str] = ()
        self.targets: Sequence[Target] = [UNLABELLED] * len(places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return decode(content_of(self.places[i])), UNLABELLED

    def where(self, i: int) -> str:
        return printable(self.names[i])

    def identity(self, i: int) -> Hashable:
        place = self.places[i]
        return place.identity() if isinstance(place, Place) else real(place)

    def sizes(self) -> list[int]:
        return sizes_of(self.places)

    def content(self, i: int) -> bytes:
        return content_of(self.places[i])

    def stamps(self) -> Iterator[str]:
        return stamps_of(self.places)


class WithoutLabels:
    """A labelled source without its labels."""

    def __init__(self, source: Source):
        self.source, self.left_out = source, source.left_out
        self.classes: Sequence[str] = ()
        self.targets: Sequence[Target] = [UNLABELLED] * len(source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.source[i][0], UNLABELLED

    def where(self, i: int) -> str:
        return self.source.where(i)

    def identity(self, i: int) -> Hashable:
        return self.source.identity(i)

    def sizes(self) -> Sequence[int] | None:
        return self.source.sizes()

    def content(self, i: int) -> bytes:
        return self.source.content(i)

    def stamps(self) -> Iterable[str]:
        return self.source.stamps()


class Joined:
    """The images of a labelled source, followed by those of an unlabelled one."""

    def __init__(self, labelled: Source, unlabelled: Source):
        self.labelled, self.unlabelled = labelled, unlabelled
        self.classes = labelled.classes
        self.targets: Sequence[Target] = [*labelled.targets, *unlabelled.targets]
        self.left_out = merged([labelled.left_out, unlabelled.left_out])

    def __len__(self) -> int:
        return len(self.labelled) + len(self.unlabelled)

    def part(self, i: int) -> tuple[Source, int]:
        """The source of image i, and its index there."""
        return (self.labelled, i) if i < len(self.labelled) else (self.unlabelled, i - len(self.labelled))

    def __getitem__(self, i: int) -> tuple[Image.Image, Target]:
        source, number = self.part(i)
        return source[number]

    def where(self, i: int) -> str:
        source, number = self.part(i)
        return source.where(number)

    def identity(self, i: int) -> Hashable:
        source, number = self.part(i)
        return source.identity(number)

    def sizes(self) -> Sequence[int] | None:
        parts = self.labelled.sizes(), self.unlabelled.sizes()
        return None if parts[0] is None or parts[1] is None else [*parts[0], *parts[1]]

    def content(self, i: int) -> bytes:
        source, number = self.part(i)
        return source.content(number)

    def stamps(self) -> Iterable[str]:
        return [*self.labelled.stamps(), *self.unlabelled.stamps()]


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
    left: LeftOut = {}
    files = images_below(root, left)
    if not files:
        raise UserError(f"{key}: {text} has no images{told(left)}")
    return Loose(files, files, left)


def loose_members(text: str, key: str, shards: bool) -> Loose:
    """All images in one archive, or with `shards` in all shards that `text` names. Raises `UserError` if there are none."""
    archives = shard_paths(text, key) if shards else [Path(text).expanduser()]
    left: LeftOut = {}
    images = []
    for archive in archives:
        members = index(archive, key)[0]
        names = sample_images(members, left) if shards else images_of(members, left)
        images += [(members[name], f"{name} in {archive}") for name in names]
    if not images:
        raise UserError(f"{key}: {text} has no images{told(left)}")
    return Loose([place for place, _ in images], [name for _, name in images], left)
