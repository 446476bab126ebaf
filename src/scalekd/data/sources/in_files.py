"""What all sources of labelled images in files on disk have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from PIL import Image

from scalekd.common.text import printable
from scalekd.data.images import decode, read_file
from scalekd.data.targets import Target

from .content import real, sizes_of, stamps_of


class InFiles:
    """Images in files; a source fills `files` and `targets` with a value for each image."""

    files: list[str]
    targets: Sequence[Target]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, Target]:
        return decode(read_file(self.files[i])), self.targets[i]

    def where(self, i: int) -> str:
        return printable(self.files[i])

    def identity(self, i: int) -> str:
        return real(self.files[i])

    def sizes(self) -> list[int]:
        return sizes_of(self.files)

    def content(self, i: int) -> bytes:
        return read_file(self.files[i])

    def stamps(self) -> Iterator[str]:
        return stamps_of(self.files)
