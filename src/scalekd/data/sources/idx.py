"""IDX files, the format of MNIST, and the part of Fashion-MNIST that ships with scalekd."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from scalekd.common.errors import UserError

from .content import real
from .names import LeftOut

FASHION_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


class Idx:
    """Images from a pair of IDX files, held in memory."""

    def __init__(self, prefix: str, classes: list[str] | None, key: str):
        self.prefix = prefix
        self._file = real(prefix)
        self.left_out: LeftOut = {}
        self.images = _read_idx(f"{prefix}-images-idx3-ubyte", 3, key)
        self.targets = _read_idx(f"{prefix}-labels-idx1-ubyte", 1, key).tolist()
        if len(self.images) != len(self.targets):
            raise UserError(f"{key}: {prefix} has {len(self.images)} images and {len(self.targets)} labels")
        if not self.images.size:
            raise UserError(f"{key}: {prefix} has no images, or images without pixels")
        self.classes = classes or [str(c) for c in range(max(self.targets) + 1)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[i]), self.targets[i]

    def where(self, i: int) -> str:
        return f"image {i} of {self.prefix}"

    def identity(self, i: int) -> tuple[str, int]:
        return self._file, i

    def sizes(self) -> list[int]:
        return [self.images[0].size] * len(self.targets)

    def content(self, i: int) -> bytes:
        return self.images[i].tobytes()

    def stamps(self) -> list[str]:
        return [hashlib.sha256(self.images.tobytes()).hexdigest()]


def fashion_mnist(split: str, key: str) -> Idx:
    """The shipped part of Fashion-MNIST: 10,000 images for `train` and for `test`."""
    if split not in ("train", "test"):
        raise UserError(f"{key}: there is no `fashion-mnist:{split}`; choose fashion-mnist:train or fashion-mnist:test")
    with resources.as_file(resources.files("scalekd") / "demo" / "data") as folder:
        return Idx(str(folder / split), FASHION_CLASSES, key)


def _read_idx(path: str, dims: int, key: str) -> np.ndarray:
    """The bytes in `path` or `path`.gz, as an array of `dims` dimensions."""
    file = next((p for p in (Path(path), Path(path + ".gz")) if p.is_file()), None)
    if file is None:
        raise UserError(f"{key}: neither {path} nor {path}.gz exists")
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        shape = np.frombuffer(raw, ">u4", count=dims, offset=4)
        if raw[:4] != bytes([0, 0, 8, dims]):
            raise ValueError(f"it starts with the bytes {raw[:4].hex()}, which do not mean {dims}-dimensional bytes")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{key}: {file} is not a complete IDX file: {error}") from None
