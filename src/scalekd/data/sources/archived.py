"""What all sources of labelled images in archives have in common: images are read in place."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image

from scalekd.common.text import printable
from scalekd.data.images import decode

from .content import Place, sizes_of, stamps_of


class Archived:
    """Images at known places in archives; a source fills `names`, `places` and `targets` with a value for each image."""

    names: list[str]
    places: list[Place]
    targets: list[int]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return decode(self.places[i].read()), self.targets[i]

    def where(self, i: int) -> str:
        return printable(f"{self.names[i]} in {self.places[i].archive}")

    def identity(self, i: int) -> tuple[str, int]:
        return self.places[i].identity()

    def sizes(self) -> list[int]:
        return sizes_of(self.places)

    def content(self, i: int) -> bytes:
        return self.places[i].read()

    def stamps(self) -> Iterator[str]:
        return stamps_of(self.places)
