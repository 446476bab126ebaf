"""Batches for a detector from COCO annotations: images of any size with boxes, labels and masks.

As in `scalekd.data`, items are indexed by (epoch, index) and every random choice depends on (seed, epoch, index).
`coco.py` opens and checks the files.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from scalekd.common.errors import UserError
from scalekd.common.seeds import seed_everything
from scalekd.common.text import printable
from scalekd.data.batches import checked, dead_class, unreadable
from scalekd.data.fingerprint import Listing
from scalekd.data.images import Bad, BadImage, BadImages, decode, of_channels, read_file
from scalekd.data.reading import Outage
from scalekd.data.samplers import EvalSampler, Key
from scalekd.data.workers import loaded

from .coco import Coco
from .instances import Instance, Picture
from .masks import mask_of

Target = dict[str, Tensor]
NARROWEST = 400  # largest ratio of an image's long side to its short side


class DetectionBatch(NamedTuple):
    images: list[Tensor]  # each (C, H, W) uint8, of its own size
    targets: list[Target]
    """Training: `boxes` (N, 4) float32, left, top, right, bottom in pixels; `labels` (N,) int64 from 1; and, if the detector
    has masks, `masks` (N, H, W) uint8. Always: `picture`, the index in `Coco.pictures`, and `size` (2,), height and width of the file."""
    skipped: Sequence[Bad] = ()  # images that could not be read


@dataclass(frozen=True)
class Scales:
    """Transforms of training images. The defaults are those of mmdetection's multi-scale recipes up to 1333x800.

    Evaluation images are not resized: the detector does it, and returns boxes in pixels of the file.
    """

    short: tuple[int, ...] = tuple(range(480, 801, 32))  # pixels: the short side is resized to one of these
    long: int = 1333  # pixels: largest long side
    flip: float = 0.5  # probability of a horizontal flip
    channels: int = 3

    def limited(self, limit: int | None) -> Scales:
        """The same with no side over `limit` pixels, as `Detector.limit`; None changes nothing."""
        if limit is None:
            return self
        return replace(self, short=tuple(s for s in self.short if s <= limit) or (limit,), long=min(self.long, limit))


class DetectionImages(Dataset):
    """Images indexed by (epoch, index), as `scalekd.data.batches.Images`.

    With a seed, for training: augmented, with targets, only images with objects, without crowd regions. Without a
    seed, for evaluation: all images, unchanged.

    An image that cannot be used is returned as a `UserError`. With `bad`, it is skipped and recorded there; in
    training the next image takes its place. A class without a readable image is an error in any case.

    masks: whether targets have them.
    """

    def __init__(self, coco: Coco, scales: Scales, seed: int | None, bad: BadImages | None = None, masks: bool = True):
        self.coco, self.scales, self.seed, self.bad, self.masks = coco, scales, seed, bad, masks
        self.alive: set[int] = set()  # classes with bad images that have a readable one
        self.skippable = False  # whether there is a recipe that can say so, for the message
        self.indices = list(range(len(coco.pictures))) if seed is None else coco.with_objects()
        self.augment = v2.Compose(
            [
                v2.RandomShortestSize(list(scales.short), scales.long, antialias=True),
                v2.RandomHorizontalFlip(scales.flip),
            ]
        )

    def __len__(self) -> int:
        return len(self.indices)

    def listed(self) -> Listing:
        """Names, objects and files of the images, for their fingerprint."""
        pictures = [self.coco.pictures[i] for i in self.indices]
        objects = [[(x.label, x.box, x.crowd) for x in picture.instances] for picture in pictures]
        paths = [picture.path for picture in pictures]
        return Listing(self.coco.classes, objects, paths, paths)

    def __getitem__(self, key: Key) -> DetectionBatch | UserError:
        epoch, index = key
        if self.seed is not None:
            seed_everything(self.seed, epoch, index)
        skipped: list[Bad] = []
        # if more images in a row are bad than are allowed, the run stops anyway
        spare = self.bad.allowed if self.bad and self.seed is not None else 0
        for i in range(index, index + spare + 1):
            number = self.indices[i % len(self)]
            picture = self.coco.pictures[number]
            try:
                image = _read(picture)
            except BadImage as error:
                if self.bad is None:
                    return UserError(
                        f"cannot use {printable(picture.path)}: {printable(str(error))}. Repair or remove the file"
                        + ", or set data.on_bad_image=skip" * self.skippable
                    )
                if dead := self._dead_class(number):
                    return dead
                skipped.append(Bad(picture.path, str(error)))
            except Outage as error:
                return error
            else:
                pixels, target = self._item(image, picture)
                target |= {"picture": torch.tensor(number), "size": torch.tensor([picture.height, picture.width])}
                return DetectionBatch([pixels], [target], skipped)
        return DetectionBatch([], [], skipped)

    def _dead_class(self, number: int) -> UserError | None:
        """The error if no image with one of the classes in this bad image can be read."""
        pictures = self.coco.pictures
        return dead_class(
            _labels(pictures[number]),
            lambda label: (i for i in self.indices if label in _labels(pictures[i])),
            lambda i: _read(pictures[i]),
            self.alive,
            lambda label: self.coco.classes[label - 1],
            "training" if self.seed is not None else "validation",
            pictures[number].path,
        )

    def still_bad(self, names: Iterable[str]) -> dict[str, str]:
        """The reason for each of these images that cannot be used. Raises `Outage`."""
        pictures = (self.coco.pictures[number] for number in self.indices)
        return unreadable(names, ((p.path, partial(_read, p)) for p in pictures))

    def _item(self, image: Image.Image, picture: Picture) -> tuple[Tensor, Target]:
        pixels = TF.pil_to_tensor(of_channels(self.scales.channels, image))
        if self.seed is None:
            return pixels, {}
        target = _target(picture, self.masks)
        pixels, target = self.augment(tv_tensors.Image(pixels), target)
        return pixels.as_subclass(Tensor), {name: value.as_subclass(Tensor) for name, value in target.items()}


def _labels(picture: Picture) -> list[int]:
    """The classes of its objects, without crowds."""
    return sorted({instance.label for instance in picture.instances if not instance.crowd})


def _read(picture: Picture) -> Image.Image:
    """Raises `BadImage` if the file cannot be read, differs from its annotations in size, or is too narrow."""
    image = decode(read_file(picture.path))
    if image.size != (picture.width, picture.height):
        raise BadImage(
            f"it has {image.width}x{image.height} pixels after EXIF rotation, but its annotations are for "
            f"{picture.width}x{picture.height}"
        )
    if max(image.size) > NARROWEST * min(image.size):
        raise BadImage(f"it is too narrow, {image.width}x{image.height} pixels: resizing would leave no short side")
    return image


def _target(picture: Picture, with_masks: bool) -> Target:
    """Boxes, labels and, if wanted, masks of the picture's objects, without crowds."""
    height, width = picture.height, picture.width
    objects = [instance for instance in picture.instances if not instance.crowd]
    boxes = torch.tensor([_corners(instance) for instance in objects], dtype=torch.float32).reshape(-1, 4)
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.tensor([instance.label for instance in objects], dtype=torch.int64),
    }
    if with_masks:
        masks = np.stack([mask_of(instance.mask, height, width) for instance in objects])
        target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
    return target


def _corners(instance: Instance) -> tuple[float, float, float, float]:
    x, y, width, height = instance.box
    return x, y, x + width, y + height


# ---------------------------------------------------------------- batches


def collate(samples: list[DetectionBatch | UserError]) -> DetectionBatch | UserError:
    """One batch of all samples, or the first error among them."""
    images: list[Tensor] = []
    targets: list[Target] = []
    skipped: list[Bad] = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        images += sample.images
        targets += sample.targets
        skipped += sample.skipped
    return DetectionBatch(images, targets, skipped)


def batches_of(
    images: DetectionImages, sampler: Sampler, workers: int, pin: bool
) -> Generator[DetectionBatch, None, None]:
    """The batches with the keys of `sampler`, a `TrainSampler` or `EvalSampler`. Raises `UserError`."""
    return checked(loaded(images, sampler, workers, pin, collate), images.bad)


def eval_batches(
    images: DetectionImages, batch_size: int, workers: int, pin: bool, rank: int = 0, world: int = 1
) -> Generator[DetectionBatch, None, None]:
    return batches_of(images, EvalSampler(len(images), batch_size, rank, world), workers, pin)
