"""Transforms for training and validation, which return uint8 pixels, and mixup."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms.functional import to_pil_image

from scalekd.common.sections import height_and_width

from .images import of_channels
from .jpeg import JpegCrop
from .options import Augment, Data

THINNEST = 32  # ratio of the sides from which on validation crops before it resizes
Statistic = tuple[float, ...]  # one value per channel, for pixels in [0, 1]


class Transform(Protocol):
    """Maps a PIL image to uint8 pixels."""

    def __call__(self, image: Image.Image) -> Any: ...


class TrainTransform:
    """The augmentation of training images: PIL image -> uint8 (C, H, W)."""

    def __init__(self, crop: Transform, after: Callable[[Any], Tensor], jpeg: JpegCrop | None, pictures: bool):
        self.crop, self.after, self.jpeg = crop, after, jpeg
        self.pictures = pictures  # whether `after` needs PIL images

    def __call__(self, image: Image.Image) -> Tensor:
        return self.after(self.crop(image))

    def of_file(self, data: bytes) -> Tensor | None:
        """The same of an encoded image, by `data.decoder`; None if it is an image for Pillow."""
        pixels = self.jpeg(data) if self.jpeg else None
        if pixels is None:
            return None
        return self.after(to_pil_image(pixels) if self.pictures else pixels)


def train_transform(data: Data, augment: Augment, mean: Statistic, std: Statistic) -> TrainTransform:
    """The augmentation of a recipe.

    `mean` and `std` are the student's, per channel; erasing and geometric augmentations fill with them. Raises
    `UserError` if a package is missing.
    """
    size = height_and_width(data.image_size)
    first, middle, last = create_transform(
        (data.channels, *size),
        is_training=True,
        separate=True,
        normalize=False,
        scale=augment.scale,
        hflip=augment.flip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        mean=mean,
        std=std,
    )
    crop, *flip = first.transforms
    jpeg = JpegCrop(crop, data.channels) if data.decoder == "simplejpeg" else None
    if augment.crop != "random_resized":
        steps: list[Any] = [T.Resize(size, T.InterpolationMode(augment.interpolation))]
        steps += [T.RandomCrop(size, padding=augment.pad)] if augment.crop == "pad" else []
        crop, flip = T.Compose(steps), [T.RandomHorizontalFlip(augment.flip)]
    erase = [_Erase(augment.erase, mean, std)] if augment.erase else []
    after = T.Compose([*flip, middle, last, *erase])
    return TrainTransform(T.Compose([_convert(data.channels), crop]), after, jpeg, bool(middle.transforms))


def eval_transform(data: Data, augment: Augment) -> Transform:
    """The transform of validation images, resize and centre crop: PIL image -> uint8 (C, H, W)."""
    size = height_and_width(data.image_size)
    last = create_transform(
        (data.channels, *size),
        is_training=False,
        normalize=False,
        crop_pct=augment.crop_pct,
        interpolation=augment.interpolation,
    )
    most = THINNEST * max(size) / min(size)
    return T.Compose([T.Lambda(partial(_middle, most)), _convert(data.channels), last])


def _middle(most: float, image: Image.Image) -> Image.Image:
    """The middle of a very thin image, whose long side is `most` times the short one; other images unchanged.

    The centre crop keeps a part of it only, but the resize before it would make an image of gigabytes.
    """
    width, height = image.size
    longest = math.ceil(most * min(width, height))
    if max(width, height) <= longest:
        return image
    wide, high = min(width, longest), min(height, longest)
    left, top = (width - wide) // 2, (height - high) // 2
    return image.crop((left, top, left + wide, top + high))


def _convert(channels: int) -> Transform:
    return T.Lambda(partial(of_channels, channels))


class _Erase:
    """timm's random erasing with normal noise in normalised space, converted to uint8 pixels.

    Only the erased area is converted: other pixels would be normalised and come back as they were.
    """

    def __init__(self, probability: float, mean: Statistic, std: Statistic):
        self.erase = RandomErasing(probability, mode="pixel", device="cpu")
        self.mean, self.std = (255 * torch.tensor(v).view(-1, 1, 1) for v in (mean, std))

    def __call__(self, image: Tensor) -> Tensor:
        areas = _Areas(image.shape)
        self.erase(areas)
        for where, noise in areas.filled:
            image[where] = (noise * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)
        return image


class _Areas:
    """Stands in for a normalised image (C, H, W): records which areas are filled, and with what."""

    dtype = torch.float32

    def __init__(self, shape: torch.Size):
        self.shape, self.filled = shape, list[tuple[Any, Tensor]]()

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, where: Any, noise: Tensor) -> None:
        self.filled.append((where, noise))


def make_mixup(augment: Augment, classes: int, multi_label: bool = False) -> Mixup | None:
    """timm's Mixup, or None if the recipe uses neither mixup nor CutMix. The task loss applies label smoothing."""
    if not (augment.mixup or augment.cutmix):
        return None
    return Mixup(augment.mixup, augment.cutmix, label_smoothing=0.0, num_classes=classes, multi_label=multi_label)


def mixed(images: Tensor, targets: Tensor, mixup: Mixup) -> tuple[Tensor, Tensor]:
    """Mixes the labelled images, which come first, and the others separately.

    Args:
        images: (B, C, H, W).
        targets: of the first L images, classes (L,), or (L, classes) of 0 and 1.

    Returns the mixed images and soft targets (L, classes).
    """
    labelled = len(targets)
    if labelled == len(images):
        return mixup(images, targets)
    unused = targets.new_zeros(len(images) - labelled, *targets.shape[1:])
    others, _ = mixup(images[labelled:], unused)
    if not labelled:
        return others, targets
    first, soft = mixup(images[:labelled], targets)
    return torch.cat([first, others]), soft
