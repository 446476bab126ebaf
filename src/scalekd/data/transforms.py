"""Augmentation of images to uint8 pixels, validation preprocessing, and mixup."""

from __future__ import annotations

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

Statistic = tuple[float, ...]  # one value per channel, for pixels in [0, 1]


class Transform(Protocol):
    def __call__(self, image: Image.Image) -> Any: ...


# ---------------------------------------------------------------- transforms


def train_transform(data: Data, augment: Augment, mean: Statistic, std: Statistic) -> Transform:
    """PIL image -> uint8 (C, H, W). `mean` and `std` are the student's, for what erasing and shears fill in."""
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
    """PIL image -> uint8 (C, H, W): resize, centre crop."""
    last = create_transform(
        (data.channels, *height_and_width(data.image_size)),
        is_training=False,
        normalize=False,
        crop_pct=augment.crop_pct,
        interpolation=augment.interpolation,
    )
    return T.Compose([_convert(data.channels), last])


def _convert(channels: int) -> Transform:
    return T.Lambda(partial(of_channels, channels))


class _Erase:
    """timm's random erasing with normal noise in normalised space, taken back to uint8 pixels."""

    def __init__(self, probability: float, mean: Statistic, std: Statistic):
        self.erase = RandomErasing(probability, mode="pixel", device="cpu")
        self.mean, self.std = (255 * torch.tensor(v).view(-1, 1, 1) for v in (mean, std))

    def __call__(self, image: Tensor) -> Tensor:
        erased = self.erase((image - self.mean) / self.std)
        return (erased * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)


def make_mixup(augment: Augment, classes: int) -> Mixup | None:
    """timm's Mixup, or None. Label smoothing stays with the task loss."""
    if not (augment.mixup or augment.cutmix):
        return None
    return Mixup(augment.mixup, augment.cutmix, label_smoothing=0.0, num_classes=classes)


def mixed(images: Tensor, targets: Tensor, mixup: Mixup) -> tuple[Tensor, Tensor]:
    """Mixup among the labelled images, which come first, and among the others; targets (L, classes) of the former."""
    labelled = len(targets)
    if labelled == len(images):
        return mixup(images, targets)
    nothing = targets.new_zeros(len(images) - labelled)
    others, _ = mixup(images[labelled:], nothing)
    if not labelled:
        return others, targets
    first, soft = mixup(images[:labelled], targets)
    return torch.cat([first, others]), soft
