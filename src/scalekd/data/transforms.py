"""Transforms for training and validation, which return uint8 pixels, and mixup."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Protocol

import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms as T

from scalekd.common.sections import height_and_width

from .images import of_channels
from .options import Augment, Data

THINNEST = 32  # ratio of the sides from which on validation crops before it resizes
Statistic = tuple[float, ...]  # one value per channel, for pixels in [0, 1]


class Transform(Protocol):
    """Maps a PIL image to uint8 pixels."""

    def __call__(self, image: Image.Image) -> Any: ...


def train_transform(data: Data, augment: Augment, mean: Statistic, std: Statistic) -> Transform:
    """The augmentation of training images: PIL image -> uint8 (C, H, W).

    `mean` and `std` are the student's, per channel; erasing and geometric augmentations fill with them.
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
    if augment.crop != "random_resized":
        steps: list[Any] = [T.Resize(size, T.InterpolationMode(augment.interpolation))]
        steps += [T.RandomCrop(size, padding=augment.pad)] if augment.crop == "pad" else []
        first = T.Compose([*steps, T.RandomHorizontalFlip(augment.flip)])
    erase = [_Erase(augment.erase, mean, std)] if augment.erase else []
    return T.Compose([_convert(data.channels), first, middle, last, *erase])


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
    """timm's random erasing with normal noise in normalised space, converted back to uint8 pixels."""

    def __init__(self, probability: float, mean: Statistic, std: Statistic):
        self.erase = RandomErasing(probability, mode="pixel", device="cpu")
        self.mean, self.std = (255 * torch.tensor(v).view(-1, 1, 1) for v in (mean, std))

    def __call__(self, image: Tensor) -> Tensor:
        erased = self.erase((image - self.mean) / self.std)
        return (erased * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)


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
