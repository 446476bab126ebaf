"""The interface of an image source."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

from PIL import Image


class Source(Protocol):
    """Picklable, and safe to read from several processes. `source[i]` is a loaded image, mode L or RGB, and its class."""

    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def targets(self) -> Sequence[int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        """Raises `BadImage`."""
        ...

    def where(self, i: int) -> str:
        """Names image i for a person: the file, or the archive and the file in it."""
        ...

    def identity(self, i: int) -> Hashable:
        """Equal for one image in two sources, however their paths are written. Reads no image."""
        ...
