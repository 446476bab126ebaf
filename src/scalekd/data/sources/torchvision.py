"""torchvision's data sets that are already on disk; nothing is downloaded."""

from __future__ import annotations

import hashlib
import inspect
import os
from typing import Any

import numpy as np
import torch
from PIL import Image

from scalekd.common.errors import UserError, first_line, nearest
from scalekd.data.images import BadImage, decode, plain, read_file
from scalekd.data.reading import Outage, steadily

from .content import real, stamp
from .names import LeftOut

FILES = ("samples", "imgs", "_samples", "_image_files", "_images", "images")  # attributes that may list files


def _load(path: str) -> Image.Image:
    return decode(read_file(path))


class TorchVision:
    """`NAME:SPLIT:ROOT`, read by torchvision's class of that name."""

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
                raise UserError(f"{key}: torchvision's {name} has train and test, but no val")
            options: dict[str, Any] = {"train": split == "train"}
        else:
            options = {"split": split}
        try:
            self.images = maker(root, **options)
        except MemoryError:
            raise
        except Exception as error:  # for damaged files it may raise nearly anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{key}: torchvision cannot open {name} ({split}) under {root}: {reason}") from None
        if hasattr(self.images, "loader"):  # torchvision's own drops the orientation and clips 16 bits
            self.images.loader = _load
        self.left_out: LeftOut = {}
        self.name, self.root = f"{name} {split}", real(root)
        labels: Any = next(
            (getattr(self.images, a) for a in ("targets", "labels", "_labels") if hasattr(self.images, a)), None
        )
        try:
            self.targets = [int(label) for label in labels]
        except (TypeError, ValueError):  # no labels, or several per image
            raise UserError(
                f"{key}: torchvision's {name} does not list one class per image; export it to class folders"
            ) from None
        self.classes = [str(c) for c in getattr(self.images, "classes", range(max(self.targets) + 1))]
        wrong = next((i for i, t in enumerate(self.targets) if not 0 <= t < len(self.classes)), None)
        if wrong is not None:
            raise UserError(
                f"{key}: {self.where(wrong)} has label {self.targets[wrong]}, but there are {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        try:
            # Pillow's own errors about damaged files have no number; those of the system are an outage
            image, _ = steadily(lambda: self.images[i], self.root + "/")
            if not isinstance(image, Image.Image):
                raise BadImage(f"torchvision returns {type(image).__name__}, not an image")
            return plain(image), self.targets[i]
        except (BadImage, MemoryError, Outage):
            raise
        except Exception as error:  # for a damaged file torchvision and Pillow may raise nearly anything
            raise BadImage(first_line(error)) from None

    def where(self, i: int) -> str:
        return f"image {i} of {self.name}"

    def identity(self, i: int) -> tuple[str, str, int]:
        return self.name, self.root, i

    def sizes(self) -> list[int] | None:
        """Known only for data sets that torchvision holds in memory."""
        if not len(self) or not isinstance(getattr(self.images, "data", None), (np.ndarray, torch.Tensor)):
            return None
        return [np.asarray(self.images.data[0]).nbytes] * len(self)

    def content(self, i: int) -> bytes:
        if not hasattr(self.images, "data"):
            raise BadImage("torchvision does not give the bytes of its files")
        return np.asarray(self.images.data[i]).tobytes()

    def stamps(self) -> list[str]:
        """Of the files that torchvision lists, or of the pixels that it holds in memory."""
        if self.sizes() is not None:
            return [hashlib.sha256(np.asarray(self.images.data).tobytes()).hexdigest()]
        listed: Any = next((getattr(self.images, a) for a in FILES if hasattr(self.images, a)), ())
        files = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in listed]
        return [stamp(file) for file in files if os.path.isfile(file)]
