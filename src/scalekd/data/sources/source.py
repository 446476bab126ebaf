"""The interface of an image source."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol

from PIL import Image

from scalekd.data.targets import Target

from .names import LeftOut


class Source(Protocol):
    """A map-style data set of images. Sources can be pickled and read by several processes at the same time."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names; empty without labels."""
        ...

    @property
    def targets(self) -> Sequence[Target]:
        """The class of every image, or `UNLABELLED`; in multi-label data the set of its classes."""
        ...

    @property
    def left_out(self) -> LeftOut:
        """Files that the source did not take, by reason."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> tuple[Image.Image, Target]:
        """Image i, loaded, mode L or RGB, and its target. Raises `BadImage`."""
        ...

    def where(self, i: int) -> str:
        """The name of image i for messages: its file, or its archive and the file in it."""
        ...

    def identity(self, i: int) -> Hashable:
        """A key that is equal for the same image in two sources, even if their paths differ. Reads no image."""
        ...

    def sizes(self) -> Sequence[int] | None:
        """The bytes of every encoded image, to find equal ones; None if the source cannot tell. Reads no image."""
        ...

    def content(self, i: int) -> bytes:
        """The encoded image i, or its pixels if it is not encoded. Raises `BadImage`."""
        ...

    def stamps(self) -> Iterable[str]:
        """Texts that change when the images change under the same names. Reads no image."""
        ...
