"""From a data source to batches: `Batch(images, targets)`, reproducible sample by sample.

Every random choice is derived from (seed, epoch, index), never from the order in which workers run,
so a run can stop and go on at any step and see the same pixels.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms as T

from .config import Augment, Data, height_and_width
from .errors import UserError
from .sources import Source, open_source

Key = tuple[int, int]  # epoch, index
Statistic = tuple[float, ...]  # one value per channel, for pixels in [0, 1]


class Batch(NamedTuple):
    images: Tensor  # (B, C, H, W) uint8
    targets: Tensor  # (B,) int64


class Transform(Protocol):
    def __call__(self, image: Image.Image) -> Any: ...


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seeds Python's, NumPy's and torch's global generators, which timm and torchvision draw from."""
    seed = seed_from(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed: for every sample, that costs a millisecond
    if torch.cuda.is_initialized():  # never in a worker process
        torch.cuda.manual_seed(seed)


class Images(Dataset):
    """A source's images, transformed; asked for by (epoch, index). Random only with a seed.

    An image that cannot be read comes back as a `UserError` in place of the sample: an exception
    raised in a worker process would reach the person as a trace.
    """

    def __init__(self, source: Source, indices: Sequence[int], transform: Transform, seed: int | None):
        self.source, self.indices, self.transform, self.seed = source, indices, transform, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | UserError:
        epoch, index = key
        if self.seed is not None:
            seed_everything(self.seed, epoch, index)
        try:
            image, target = self.source[self.indices[index]]
            return self.transform(image), target
        except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:  # all are Pillow's
            return UserError(
                f"cannot read {self.source.where(self.indices[index])}: {error}. Remove or replace that file."
            )


def _collate(samples: list[Any]) -> Batch | UserError:
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    images, targets = zip(*samples)
    return Batch(torch.stack(images), torch.tensor(targets))


class TrainSampler(Sampler):
    """The keys of every micro-batch from `start_step` to `total_steps`, epoch after epoch.

    One global batch is a slice of the epoch's permutation; micro-batch a of rank r takes its
    (a * world + r)-th part. So a run sees the same global batches on any number of processes,
    and starts in the middle of an epoch by arithmetic. The rest of an epoch is left out.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        total_steps: int,
        start_step: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.total_steps, self.start_step = total_steps, start_step
        self.accumulate, self.rank, self.world = accumulate, rank, world

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        per_epoch = self.size // self.batch_size
        part = self.batch_size // (self.accumulate * self.world)
        shuffled, order = -1, []
        for step in range(self.start_step, self.total_steps):
            epoch, k = divmod(step, per_epoch)
            if epoch != shuffled:
                generator = torch.Generator().manual_seed(seed_from(self.seed, epoch))
                shuffled, order = epoch, torch.randperm(self.size, generator=generator).tolist()
            for a in range(self.accumulate):
                first = k * self.batch_size + (a * self.world + self.rank) * part
                yield [(epoch, i) for i in order[first : first + part]]


class _EvalSampler(Sampler):
    """All images once, in order; rank r takes every world-th batch."""

    def __init__(self, size: int, batch_size: int, rank: int, world: int):
        self.starts = range(rank * batch_size, size, world * batch_size)
        self.size, self.batch_size = size, batch_size

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[Key]]:
        for first in self.starts:
            yield [(0, i) for i in range(first, min(first + self.batch_size, self.size))]


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
    return T.Lambda(_to_grey if channels == 1 else _to_rgb)


def _to_grey(image: Image.Image) -> Image.Image:
    return image.convert("L")


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


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


# ---------------------------------------------------------------- the data of a run


class Split(NamedTuple):
    """Which images of which source a run trains on and validates on."""

    classes: list[str]
    train: Source
    train_indices: Sequence[int]
    val: Source
    val_indices: Sequence[int]


def open_split(data: Data) -> Split:
    """Opens the sources of a run. Raises `UserError` for missing folders, empty classes, unequal class lists."""
    train = open_source(data.train, "data.train")
    order = _by_class(train.targets, data.seed)
    if data.val is not None:
        val = open_source(data.val, "data.val")
        val_indices: Sequence[int] = range(len(val))
        if list(val.classes) != list(train.classes):
            odd = sorted(set(val.classes) ^ set(train.classes))
            raise UserError(
                f"data.train has {len(train.classes)} classes and data.val {len(val.classes)}; "
                f"not in both: {', '.join(odd[:5]) or 'none, but the order differs'}. "
                "Give both the same class folders."
            )
    else:
        held = max(len(train.classes), round(len(train) * data.val_fraction))
        val, val_indices, order = train, sorted(order[:held]), order[held:]
        if len(order) < len(train.classes):
            raise UserError(
                f"data.train has {len(train)} images, too few to hold out {held} for validation; name a data.val"
            )
    return Split(list(train.classes), train, sorted(order[: data.limit]), val, val_indices)


def training_images(split: Split, data: Data, augment: Augment, mean: Statistic, std: Statistic, seed: int) -> Images:
    return Images(split.train, split.train_indices, train_transform(data, augment, mean, std), seed)


def validation_images(split: Split, data: Data, augment: Augment) -> Images:
    return Images(split.val, split.val_indices, eval_transform(data, augment), None)


def _by_class(targets: Sequence[int], seed: int) -> list[int]:
    """A seeded order of all indices in which every prefix holds the classes as evenly as can be."""
    generator = torch.Generator().manual_seed(seed_from("by class", seed))
    shuffled = torch.randperm(len(targets), generator=generator).tolist()
    seen: dict[int, int] = {}
    turns = []
    for i in shuffled:
        turns.append((seen.setdefault(targets[i], 0), i))
        seen[targets[i]] += 1
    return [i for _, i in sorted(turns, key=lambda turn: turn[0])]


def train_batches(images: Images, sampler: TrainSampler, workers: int, pin: bool) -> Iterator[Batch]:
    """The micro-batches of a whole run. Raises `UserError` for an image that cannot be read."""
    return _checked(
        DataLoader(images, batch_sampler=sampler, num_workers=_workers(workers), collate_fn=_collate, pin_memory=pin)
    )


def eval_batches(
    images: Images, batch_size: int, workers: int, pin: bool, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    sampler = _EvalSampler(len(images), batch_size, rank, world)
    return _checked(
        DataLoader(images, batch_sampler=sampler, num_workers=_workers(workers), collate_fn=_collate, pin_memory=pin)
    )


def _workers(asked: int) -> int:
    return min(asked, os.cpu_count() or 1)  # more only get in each other's way; the images do not depend on it


def _checked(loader: DataLoader) -> Iterator[Batch]:
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch
