"""From a data source to batches: `Batch(images, targets)`, reproducible sample by sample.

Images without labels come after those with labels in every batch; there are as many targets as labels.

Every random choice is derived from (seed, epoch, index), never from the order in which workers run,
so a run can stop and go on at any step and see the same pixels.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Generator, Iterable, Sequence, Sized
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

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
from .images import Bad, BadImage, BadImages, of_channels
from .samplers import EvalSampler, Key, TrainSampler, seed_from
from .sources import UNLABELLED, Joined, Source, WithoutLabels, open_source, open_unlabelled
from .stop import leave_signals_to_parent

REST = "rest"  # `data.unlabelled`: what `data.limit` leaves out of `data.train`
Statistic = tuple[float, ...]  # one value per channel, for pixels in [0, 1]


class Batch(NamedTuple):
    images: Tensor  # (B, C, H, W) uint8
    targets: Tensor  # (L,) int64, of the first L images; the others have no label
    skipped: Sequence[Bad] = ()  # images that could not be read on the way


class Transform(Protocol):
    def __call__(self, image: Image.Image) -> Any: ...


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

    labelled: how many of `indices` are of labelled images, which come first; all unless given.

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
        labelled: int | None = None,
    ):
        self.source, self.indices, self.transform, self.seed, self.bad = source, indices, transform, seed, bad
        self.labelled = len(indices) if labelled is None else labelled

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> Sample | UserError:
        epoch, index = key
        if self.seed is not None:
            seed_everything(self.seed, epoch, index)
        skipped: list[Bad] = []
        # more bad ones in a row than are allowed: enough to know that the run must stop
        spare = self.bad.allowed if self.bad and self.seed is not None else 0
        first, size = (0, self.labelled) if index < self.labelled else (self.labelled, len(self) - self.labelled)
        for i in range(index, index + spare + 1):  # the one that takes its place has a label if it had one
            place = self.indices[first + (i - first) % size]
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
    known = [target for target in targets if target != UNLABELLED]
    return Batch(torch.stack(images), torch.tensor(known, dtype=torch.int64), skipped)


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


# ---------------------------------------------------------------- the data of a run


class Split(NamedTuple):
    """Which images of which source a run trains on and validates on; those without labels follow those with."""

    classes: list[str]
    train: Source
    train_indices: Sequence[int]
    val: Source
    val_indices: Sequence[int]
    labelled: int  # of train_indices


def open_split(data: Data) -> Split:
    """Opens the sources of a run. Raises `UserError` for missing folders, empty classes, unequal class lists."""
    if data.train is None:
        return _with_unlabelled(None, data)
    train = open_source(data.train, "data.train")
    unused = sorted(set(range(len(train.classes))) - set(train.targets)) if _numbered(train.classes) else []
    if unused:
        raise UserError(
            f"data.train has labels up to {max(train.targets)} and no image of class {unused[0]}"
            + (f" and {len(unused) - 1} others" if unused[1:] else "")
            + ". Number the classes from 0 without gaps."
        )
    order = by_class(train.targets, data.seed)
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
    kept, left = sorted(order[: data.limit]), sorted(order[len(order) if data.limit is None else data.limit :])
    split = Split(list(train.classes), train, kept, val, val_indices, len(kept))
    return split if data.unlabelled is None else _with_unlabelled(split, data, left)


def _with_unlabelled(split: Split | None, data: Data, left: Sequence[int] = ()) -> Split:
    """`split` with the images of `data.unlabelled`, or these alone. left: of the labelled source, what is not used."""
    assert data.unlabelled is not None
    if data.unlabelled == REST:
        assert split is not None
        unlabelled: Source = WithoutLabels(split.train)
        indices = left
    else:
        unlabelled = open_unlabelled(data.unlabelled, "data.unlabelled")
        indices = range(len(unlabelled))
    if data.unlabelled_limit is not None:
        generator = torch.Generator().manual_seed(seed_from("unlabelled", data.seed))
        chosen = torch.randperm(len(indices), generator=generator)[: data.unlabelled_limit]
        indices = sorted(indices[i] for i in chosen.tolist())
    if not indices:
        left_out = "rest: data.limit leaves out no image of data.train; lower it"
        raise UserError(f"data.unlabelled: {left_out if data.unlabelled == REST else 'it holds no images'}")
    if split is None:
        assert data.val is not None
        val = open_source(data.val, "data.val")
        split = Split(list(val.classes), unlabelled, indices, val, range(len(val)), 0)
    else:
        behind = [len(split.train) + i for i in indices]
        split = split._replace(train=Joined(split.train, unlabelled), train_indices=[*split.train_indices, *behind])
    _refuse_seen(split)
    return split


def _refuse_seen(split: Split) -> None:
    """Validation images must not be trained on, with or without their labels."""
    held = {split.val.identity(i) for i in split.val_indices}
    seen = [i for i in split.train_indices[split.labelled :] if split.train.identity(i) in held]
    if seen:
        raise UserError(
            f"data.unlabelled holds {len(seen)} of the validation images, such as {split.train.where(seen[0])}. Name a source without "
            "them; `data.unlabelled: rest` takes what data.limit leaves out of data.train"
        )


def training_images(split: Split, data: Data, augment: Augment, mean: Statistic, std: Statistic, seed: int) -> Images:
    bad = bad_images("train", data, len(split.train_indices))
    transform = train_transform(data, augment, mean, std)
    return Images(split.train, split.train_indices, transform, seed, bad, split.labelled)


def validation_images(split: Split, data: Data, augment: Augment) -> Images:
    bad = bad_images("val", data, len(split.val_indices))
    return Images(split.val, split.val_indices, eval_transform(data, augment), None, bad)


def bad_images(part: str, data: Any, images: int) -> BadImages | None:
    return BadImages(part, images, data.max_bad) if data.on_bad_image == "skip" else None


def same_classes(known: Sequence[str], found: Sequence[str]) -> bool:
    """Equal; or numbers from 0, worked out from labels, of which `found` need not have the highest."""
    return list(found) == list(known[: len(found)] if _numbered(known) else known)


def _numbered(classes: Sequence[str]) -> bool:
    return list(classes) == [str(i) for i in range(len(classes))]


def by_class(targets: Sequence[int], seed: int) -> list[int]:
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
    return checked(loader(images, sampler, workers, pin, _collate), images.bad)


def eval_batches(
    images: Images, batch_size: int, workers: int, pin: bool, rank: int = 0, world: int = 1
) -> Generator[Batch, None, None]:
    sampler = EvalSampler(len(images), batch_size, rank, world)
    return checked(loader(images, sampler, workers, pin, _collate), images.bad)


def load_batch(images: Images, keys: list[Key]) -> Batch:
    """One batch in this process, the same as a loader's. Raises `UserError` for an image that cannot be read."""
    return next(checked([_collate([images[key] for key in keys])], images.bad))


def loader(
    images: Dataset, sampler: Sampler, workers: int, pin: bool, collate: Callable[[list[Any]], Any]
) -> DataLoader:
    """Batches of samples whose keys `sampler` gives, in `workers` processes that leave signals to this one."""
    workers = min(workers, os.cpu_count() or 1)  # more only get in each other's way; the images do not depend on it
    return DataLoader(
        images,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=leave_signals_to_parent,
    )


class Checkable(Protocol):
    """A batch: the images in it, and those that could not be read on the way."""

    @property
    def images(self) -> Sized: ...
    @property
    def skipped(self) -> Sequence[Bad]: ...


B = TypeVar("B", bound=Checkable)


def checked(batches: Iterable[B | UserError], bad: BadImages | None) -> Generator[B, None, None]:
    """The batches that hold an image. Raises `UserError` where one stands in place of a batch, and for too many bad."""
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        if bad is not None:
            bad.add(batch.skipped)
        if len(batch.images):
            yield batch
