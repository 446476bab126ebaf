"""torchvision's data sets that are already on disk; nothing is downloaded."""

from __future__ import annotations

import inspect
from typing import Any

from PIL import Image

from scalekd.common.errors import UserError, first_line, nearest
from scalekd.data.images import BadImage, plain
from scalekd.data.reading import Outage, steadily

from .folders import real


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
            return plain(image), self.targets[i]
        except (BadImage, MemoryError, Outage):
            raise
        except Exception as error:  # for a damaged file torchvision and Pillow may raise nearly anything
            raise BadImage(first_line(error)) from None

    def where(self, i: int) -> str:
        return f"image {i} of {self.name}"

    def identity(self, i: int) -> tuple[str, str, int]:
        return self.name, self.root, i
