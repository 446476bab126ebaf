"""From a data source to batches: `Batch(images, targets)`, reproducible sample by sample.

Images without labels come after those with labels in every batch; there are as many targets as labels.

Every random choice is derived from (seed, epoch, index), never from the order in which workers run,
so a run can stop and go on at any step and see the same pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Sequence, Sized
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from scalekd.common.errors import UserError
from scalekd.common.seeds import seed_everything
from scalekd.common.stop import leave_signals_to_parent
from scalekd.common.text import printable

from .images import Bad, BadImage, BadImages
from .options import Augment, Data
from .samplers import EvalSampler, Key, TrainSampler
from .sources.source import Source
from .sources.unlabelled import UNLABELLED
from .split import Split
from .transforms import Statistic, Transform, eval_transform, train_transform


class Batch(NamedTuple):
    images: Tensor  # (B, C, H, W) uint8
    targets: Tensor  # (L,) int64, of the first L images; the others have no label
    skipped: Sequence[Bad] = ()  # images that could not be read on the way


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


def training_images(split: Split, data: Data, augment: Augment, mean: Statistic, std: Statistic, seed: int) -> Images:
    bad = bad_images("train", data, len(split.train_indices))
    transform = train_transform(data, augment, mean, std)
    return Images(split.train, split.train_indices, transform, seed, bad, split.labelled)


def validation_images(split: Split, data: Data, augment: Augment) -> Images:
    bad = bad_images("val", data, len(split.val_indices))
    return Images(split.val, split.val_indices, eval_transform(data, augment), None, bad)


def bad_images(part: str, data: Any, images: int) -> BadImages | None:
    return BadImages(part, images, data.max_bad) if data.on_bad_image == "skip" else None


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
