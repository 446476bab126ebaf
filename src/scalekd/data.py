"""From a data source to batches: `Batch(images, targets)`, reproducible sample by sample.

Every random choice is derived from (seed, epoch, index), never from the order in which workers run,
so a run can stop and go on at any step and see the same pixels.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Generator, Iterable, Iterator, Sequence
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
from .errors import UserError, printable
from .images import Bad, BadImage, BadImages
from .sources import Source, open_source
from .stop import leave_signals_to_parent

Key = tuple[int, int]  # epoch, index
Statistic = tuple[float, ...]  # one value per channel, for pixels in [0, 1]


class Batch(NamedTuple):
    images: Tensor  # (B, C, H, W) uint8
    targets: Tensor  # (B,) int64
    skipped: Sequence[Bad] = ()  # images that could not be read on the way


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


class Sample(NamedTuple):
    image: Tensor | None  # (C, H, W) uint8; None if it cannot be read and nothing takes its place
    target: int
    skipped: Sequence[Bad] = ()


class Images(Dataset):
    """A source's images, transformed; asked for by (epoch, index). Random, and for training, only with a seed.

    An image that cannot be read comes back as a `UserError` in place of the sample: an exception
    raised in a worker process would reach the person as a trace. With `bad`, which notes them, it is left out
    instead: in training the next image takes its place, so batches stay full and depend on the keys alone.
    """

    def __init__(
        self,
        source: Source,
        indices: Sequence[int],
        transform: Transform,
        seed: int | None,
        bad: BadImages | None = None,
    ):
        self.source, self.indices, self.transform, self.seed, self.bad = source, indices, transform, seed, bad

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> Sample | UserError:
        epoch, index = key
        if self.seed is not None:
            seed_everything(self.seed, epoch, index)
        skipped: list[Bad] = []
        # more bad ones in a row than are allowed: enough to know that the run must stop
        spare = self.bad.allowed if self.bad and self.seed is not None else 0
        for i in range(index, index + spare + 1):
            place = self.indices[i % len(self.indices)]
            try:
                image, target = self.source[place]
            except BadImage as error:
                if self.bad is None:
                    return UserError(
                        f"cannot read {self.source.where(place)}: {printable(str(error))}. Remove or replace that file; "
                        "`--on-bad-image skip` trains without it."
                    )
                skipped.append(Bad(self.source.where(place), str(error)))
            else:
                return Sample(self.transform(image), target, skipped)
        return Sample(None, -1, skipped)


def _collate(samples: list[Sample | UserError]) -> Batch | UserError:
    whole: list[tuple[Tensor, int]] = []
    skipped: list[Bad] = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        skipped += sample.skipped
        if sample.image is not None:
            whole.append((sample.image, sample.target))
    if not whole:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), skipped)
    images, targets = zip(*whole)
    return Batch(torch.stack(images), torch.tensor(targets), skipped)


class TrainSampler(Sampler):
    """The keys of every micro-batch from `start_step` to `total_steps`, epoch after epoch.

    One global batch is a slice of the epoch's permutation; micro-batch a of rank r takes its
    (a * world + r)-th part. So a run sees the same global batches on any number of processes,
    and starts in the middle of an epoch by arithmetic. The rest of an epoch is left out.

    With `repeats` an epoch has as many samples, but of the permutation's first size / repeats images only, each so
    often, augmented anew each time. The versions of an image are in one global batch, and there as far apart as can be.
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
        repeats: int = 1,
    ):
        self.size, self.batch_size, self.seed, self.repeats = size, batch_size, seed, repeats
        self.total_steps, self.start_step = total_steps, start_step
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.shuffled, self.order = -1, list[int]()

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start_step, self.total_steps):
            yield from self.keys_of(step)

    def keys_of(self, step: int) -> list[list[Key]]:
        """This rank's micro-batches of one step, counted from 0."""
        epoch, k = divmod(step, self.size // self.batch_size)
        part = self.batch_size // (self.accumulate * self.world)
        if epoch != self.shuffled:
            generator = torch.Generator().manual_seed(seed_from(self.seed, epoch))
            self.shuffled, self.order = epoch, torch.randperm(self.size, generator=generator).tolist()
        # every version of an image has an epoch of its own to be augmented by
        places = [divmod(place, self.repeats) for place in range(k * self.batch_size, (k + 1) * self.batch_size)]
        batch = [(epoch * self.repeats + version, self.order[i]) for i, version in places]
        batch = [key for start in range(self.repeats) for key in batch[start :: self.repeats]]
        firsts = [(a * self.world + self.rank) * part for a in range(self.accumulate)]
        return [batch[first : first + part] for first in firsts]


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
    unused = sorted(set(range(len(train.classes))) - set(train.targets)) if _numbered(train.classes) else []
    if unused:
        raise UserError(
            f"data.train has labels up to {max(train.targets)} and no image of class {unused[0]}"
            + (f" and {len(unused) - 1} others" if unused[1:] else "")
            + ". Number the classes from 0 without gaps."
        )
    order = _by_class(train.targets, data.seed)
    if data.val is not None:
        val = open_source(data.val, "data.val")
        val_indices: Sequence[int] = range(len(val))
        if not same_classes(train.classes, val.classes):
            odd = sorted(set(val.classes) ^ set(train.classes))
            raise UserError(
                f"data.train has {len(train.classes)} classes and data.val {len(val.classes)}; "
                f"not in both: {printable(', '.join(odd[:5])) or 'none, but the order differs'}. "
                "Give both the same classes."
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
    bad = _bad_images("train", data, len(split.train_indices))
    return Images(split.train, split.train_indices, train_transform(data, augment, mean, std), seed, bad)


def validation_images(split: Split, data: Data, augment: Augment) -> Images:
    bad = _bad_images("val", data, len(split.val_indices))
    return Images(split.val, split.val_indices, eval_transform(data, augment), None, bad)


def _bad_images(part: str, data: Data, images: int) -> BadImages | None:
    return BadImages(part, images, data.max_bad) if data.on_bad_image == "skip" else None


def same_classes(known: Sequence[str], found: Sequence[str]) -> bool:
    """Equal; or numbers from 0, worked out from labels, of which `found` need not have the highest."""
    return list(found) == list(known[: len(found)] if _numbered(known) else known)


def _numbered(classes: Sequence[str]) -> bool:
    return list(classes) == [str(i) for i in range(len(classes))]


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


def train_batches(images: Images, sampler: TrainSampler, workers: int, pin: bool) -> Generator[Batch, None, None]:
    """The micro-batches of a whole run. Raises `UserError` for an image that cannot be read."""
    return _checked(_loader(images, sampler, workers, pin), images.bad)


def eval_batches(
    images: Images, batch_size: int, workers: int, pin: bool, rank: int = 0, world: int = 1
) -> Generator[Batch, None, None]:
    sampler = _EvalSampler(len(images), batch_size, rank, world)
    return _checked(_loader(images, sampler, workers, pin), images.bad)


def load_batch(images: Images, keys: list[Key]) -> Batch:
    """One batch in this process, the same as a loader's. Raises `UserError` for an image that cannot be read."""
    return next(_checked([_collate([images[key] for key in keys])], images.bad))


def _loader(images: Images, sampler: Sampler, workers: int, pin: bool) -> DataLoader:
    workers = min(workers, os.cpu_count() or 1)  # more only get in each other's way; the images do not depend on it
    return DataLoader(
        images,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        worker_init_fn=leave_signals_to_parent,
    )


def _checked(loader: Iterable[Batch | UserError], bad: BadImages | None) -> Generator[Batch, None, None]:
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        if bad is not None:
            bad.add(batch.skipped)
        if len(batch.targets):
            yield batch
