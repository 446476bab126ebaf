"""Where images are: a class folder, the embedded Fashion-MNIST part, IDX files, a torchvision data set.

A source is map-style: `len()`, `source[i] -> (PIL image, class index)`, `.classes`, `.targets`, and
`.where(i)`, which names image i for a person.
"""

from __future__ import annotations

import gzip
import inspect
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .errors import UserError, nearest

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


class Source(Protocol):
    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def targets(self) -> Sequence[int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> tuple[Image.Image, int]: ...
    def where(self, i: int) -> str: ...


def open_source(text: str, key: str) -> Source:
    """Opens what a recipe's `data.train` or `data.val` names. Raises `UserError` that names `key`.

    - `/a/folder` or `folder:/a/folder`: one sub-folder of images per class;
    - `fashion-mnist:train`, `fashion-mnist:test`: the embedded part (10,000 + 10,000 images);
    - `idx:/a/folder/train`: the pair `train-images-idx3-ubyte[.gz]`, `train-labels-idx1-ubyte[.gz]`;
    - `torchvision:CIFAR100:train:/a/folder`: a torchvision data set already on disk, split and root.
    """
    kind, _, rest = text.partition(":")
    if kind == "fashion-mnist":
        if rest not in ("train", "test"):
            raise UserError(f"{key}: `{text}` is not there; write fashion-mnist:train or fashion-mnist:test")
        with resources.as_file(resources.files("scalekd") / "demo" / "data") as folder:
            return _Arrays(str(folder / rest), FASHION_CLASSES, key)
    if kind == "idx":
        return _Arrays(rest, None, key)
    if kind == "torchvision":
        return _TorchVision(rest, key)
    return _Folder(rest if kind == "folder" else text, key)


class _Folder:
    def __init__(self, text: str, key: str):
        from torchvision.datasets.folder import IMG_EXTENSIONS

        root = Path(text).expanduser()
        if not root.is_dir():
            beside = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
            raise UserError(f"{key}: no folder {text}.{nearest(root.name, beside) if beside else ''}")
        self.classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not self.classes:
            raise UserError(f"{key}: {text} has no class folders; it needs one sub-folder of images per class")
        found = [
            [str(p) for p in sorted((root / name).rglob("*")) if p.suffix.lower() in IMG_EXTENSIONS]
            for name in self.classes
        ]
        empty = [name for name, files in zip(self.classes, found) if not files]
        if empty:
            raise UserError(
                f"{key}: {text} has class folders without images: {', '.join(empty[:5])}. "
                "Fill or remove them, so that class indices mean what you think."
            )
        self.files = [file for files in found for file in files]
        self.targets = [target for target, files in enumerate(found) for _ in files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        with Image.open(self.files[i]) as image:
            image.load()
        return image, self.targets[i]

    def where(self, i: int) -> str:
        return self.files[i]


class _Arrays:
    """Images held in memory, read from a pair of IDX files (the format of MNIST)."""

    def __init__(self, prefix: str, classes: list[str] | None, key: str):
        self.prefix = prefix
        self.images = _read_idx(f"{prefix}-images-idx3-ubyte", 3, key)
        self.targets = _read_idx(f"{prefix}-labels-idx1-ubyte", 1, key).tolist()
        if len(self.images) != len(self.targets):
            raise UserError(f"{key}: {prefix} has {len(self.images)} images and {len(self.targets)} labels")
        if not self.targets:
            raise UserError(f"{key}: {prefix} holds no images")
        self.classes = classes or [str(c) for c in range(max(self.targets) + 1)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[i]), self.targets[i]

    def where(self, i: int) -> str:
        return f"image {i} of {self.prefix}"


def _read_idx(path: str, dims: int, key: str) -> np.ndarray:
    file = next((p for p in (Path(path), Path(path + ".gz")) if p.is_file()), None)
    if file is None:
        raise UserError(f"{key}: neither {path} nor {path}.gz is there")
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        shape = np.frombuffer(raw, ">u4", count=dims, offset=4)
        if raw[:4] != bytes([0, 0, 8, dims]):
            raise ValueError(f"its first bytes are {raw[:4].hex()}, not those of {dims}-dimensional bytes")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{key}: {file} is not a whole IDX file: {error}") from None


class _TorchVision:
    def __init__(self, text: str, key: str):
        from torchvision import datasets

        name, _, rest = text.partition(":")
        split, _, root = rest.partition(":")
        names = [n for n in datasets.__all__ if inspect.isclass(getattr(datasets, n))]
        if name not in names:
            raise UserError(f"{key}: torchvision has no data set `{name}`.{nearest(name, names)}")
        if split not in ("train", "test", "val") or not root:
            raise UserError(f"{key}: write torchvision:{name}:train:/folder or torchvision:{name}:test:/folder")
        maker: Any = getattr(datasets, name)
        if "train" in inspect.signature(maker).parameters:
            if split == "val":
                raise UserError(f"{key}: torchvision's {name} has train and test, and no val")
            choice: dict[str, Any] = {"train": split == "train"}
        else:
            choice = {"split": split}
        try:
            self.images = maker(root, **choice)
        except (RuntimeError, TypeError, ValueError, OSError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{key}: torchvision cannot open {name} ({split}) under {root}: {reason}") from None
        self.name = f"{name} {split}"
        labels: Any = next(
            (getattr(self.images, a) for a in ("targets", "labels", "_labels") if hasattr(self.images, a)), None
        )
        try:
            self.targets = [int(label) for label in labels]
        except (TypeError, ValueError):  # none at all, or not one class per image
            raise UserError(
                f"{key}: torchvision's {name} does not list one class per image; export it to class folders"
            ) from None
        self.classes = [str(c) for c in getattr(self.images, "classes", range(max(self.targets) + 1))]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        image, _ = self.images[i]
        return image, self.targets[i]

    def where(self, i: int) -> str:
        return f"image {i} of {self.name}"
