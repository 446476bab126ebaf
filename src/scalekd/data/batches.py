"""Turns a data source into reproducible batches of uint8 images and targets.

Every random choice depends on (seed, epoch, index) only, never on the order in which workers run. So a run can
stop and resume at any step and see the same pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence, Sized
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from scalekd.common.errors import UserError
from scalekd.common.seeds import seed_everything
from scalekd.common.text import printable

from .fingerprint import Listing
from .images import Bad, BadImage, BadImages
from .jpeg import JpegCrop
from .options import Augment, Data
from .reading import Outage
from .samplers import EvalSampler, Key, TrainSampler
from .sources.source import Source
from .sources.unlabelled import UNLABELLED, stored
from .split import Split
from .targets import Target, classes_in, multi_hot
from .transforms import Statistic, Transform, eval_transform, train_transform
from .workers import loaded

LOOKED_AT = 16  # images, to see whether they are files for the decoder


class Batch(NamedTuple):
    """Images and targets; images without labels come last."""

    images: Tensor  # (B, C, H, W) uint8
    # of the first L images, the others have no label: (L,) int64, or in multi-label data (L, classes) float32 of 0 and 1
    targets: Tensor
    skipped: Sequence[Bad] = ()  # images that could not be read while making this batch


class Sample(NamedTuple):
    """One transformed image and its class, or in multi-label data (classes,) float32 of 0 and 1."""

    image: Tensor | None  # (C, H, W) uint8; None if it cannot be read and no other image replaces it
    target: int | Tensor
    skipped: Sequence[Bad] = ()


class Images(Dataset):
    """The transformed images of a source; `images[epoch, index]` is a `Sample`.

    For an image that cannot be read it returns a `UserError` in place of the sample, because an exception in a worker
    process would show as a traceback. With `bad`, it skips the image and records it instead: in training the next
    readable image replaces it, so batches stay full and depend on the keys only. An outage, and a class without a
    readable image, are errors in any case.

    Args:
        indices: which images of `source`; those with labels come first.
        seed: seeds the random transforms of each sample. None for validation, which has none.
        bad: records unreadable images instead of returning an error.
        labelled: how many of `indices` have labels; all by default.
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
        self.alive: set[int] = set()  # classes with bad images that have a readable one
        self.skippable = False  # whether there is a recipe that can say so, for the message
        self.of_file: Callable[[bytes], Tensor | None] | None = None  # instead of `transform`, where it takes the file

    def __len__(self) -> int:
        return len(self.indices)

    def listed(self) -> Listing:
        """Names, labels and files of the images, for their fingerprint."""
        return listed(self.source, self.indices)

    def __getitem__(self, key: Key) -> Sample | UserError:
        epoch, index = key
        if self.seed is not None:
            seed_everything(self.seed, epoch, index)
        skipped: list[Bad] = []
        # after more bad images in a row than the run allows, it must stop anyway
        spare = self.bad.allowed if self.bad and self.seed is not None else 0
        first, size = (0, self.labelled) if index < self.labelled else (self.labelled, len(self) - self.labelled)
        for i in range(index, index + spare + 1):  # labelled images are replaced by labelled ones only
            number = self.indices[first + (i - first) % size]
            try:
                pixels, target = self._read(number)
            except BadImage as error:
                if self.bad is None:
                    return UserError(
                        f"cannot read {self.source.where(number)}: {printable(str(error))}. Remove or replace that file"
                        + ", or set data.on_bad_image=skip to train without it." * self.skippable
                    )
                if dead := self._dead_class(number):
                    return dead
                skipped.append(Bad(self.source.where(number), str(error)))
            except Outage as error:
                return error
            else:
                known = multi_hot(target, len(self.source.classes)) if isinstance(target, tuple) else target
                return Sample(pixels, known, skipped)
        return Sample(None, -1, skipped)

    def _read(self, number: int) -> tuple[Tensor, Target]:
        """Image `number` of the source, transformed, and its target. Raises `BadImage` and `Outage`."""
        if self.of_file is not None:
            with contextlib.suppress(BadImage):  # raised again below
                if (pixels := self.of_file(self.source.content(number))) is not None:
                    return pixels, self.source.targets[number]
        image, target = self.source[number]
        return self.transform(image), target

    def _dead_class(self, number: int) -> UserError | None:
        """The error if no image of the class of this bad image can be read."""
        targets = self.source.targets
        return dead_class(
            classes_in(targets[number]),
            lambda label: (i for i in self.indices if label in classes_in(targets[i])),
            self.source.__getitem__,
            self.alive,
            lambda label: self.source.classes[label],
            "training" if self.bad is not None and self.bad.part == "train" else "validation",
            self.source.where(number),
        )

    def still_bad(self, names: Iterable[str]) -> dict[str, str]:
        """The reason for each of these names of images that cannot be read. Raises `Outage`."""
        return unreadable(names, ((self.source.where(i), partial(self.source.__getitem__, i)) for i in self.indices))


def dead_class(
    labels: Iterable[int],
    having: Callable[[int], Iterable[int]],
    read: Callable[[int], Any],
    alive: set[int],
    name: Callable[[int], str],
    part: str,
    where: str,
) -> UserError | None:
    """The error if a class has no image that can be read, or if there is an outage while looking.

    Args:
        labels: the classes of an image that cannot be read.
        having: a class to the images that have it.
        alive: classes with a readable image, which are not looked at again; those found here are added.
        name: a class to its name.
        part: `training` or `validation`.
        where: the name of the image.
    """
    for label in labels:
        count = 0
        for i in () if label in alive else having(label):
            count += 1
            try:
                read(i)
            except BadImage:
                continue
            except Outage as error:
                return error
            alive.add(label)
            break
        if label not in alive:
            return UserError(
                f"none of the {count} {part} images of the class {printable(name(label))} can be read, such as "
                f"{printable(where)}. Repair them, or remove the class from training and validation."
            )
    return None


def unreadable(names: Iterable[str], images: Iterable[tuple[str, Callable[[], Any]]]) -> dict[str, str]:
    """Name -> reason for those of `names` that still cannot be read.

    images: the name of each image, and a function that reads it. Raises `Outage`.
    """
    listed, reasons = set(names), dict[str, str]()
    for name, read in images:
        if printable(name) not in listed:
            continue
        try:
            read()
        except BadImage as error:
            reasons[printable(name)] = printable(str(error))
    return reasons


def _collate(samples: list[Sample | UserError]) -> Batch | UserError:
    readable: list[tuple[Tensor, int | Tensor]] = []
    skipped: list[Bad] = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        skipped += sample.skipped
        if sample.image is not None:
            readable.append((sample.image, sample.target))
    if not readable:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), skipped)
    images, targets = zip(*readable)
    rows = [target for target in targets if isinstance(target, Tensor)]
    known = [target for target in targets if not isinstance(target, Tensor) and target != UNLABELLED]
    return Batch(torch.stack(images), torch.stack(rows) if rows else torch.tensor(known, dtype=torch.int64), skipped)


def listed(source: Source, indices: Sequence[int]) -> Listing:
    """Names, labels and files of some images of a source, for their fingerprint."""
    places = [stored(source, i) for i in indices]
    targets = source.targets
    return Listing(
        source.classes,
        [targets[i] for i in indices],
        [place if isinstance(place, str) else str(place or i) for place, i in zip(places, indices)],
        places,
        lambda i: source[indices[i]][0].tobytes(),
        lambda i: source.where(indices[i]),
    )


def training_images(split: Split, data: Data, augment: Augment, mean: Statistic, std: Statistic, seed: int) -> Images:
    """The augmented training images. `mean` and `std` are the student's, per channel, for pixels in [0, 1]."""
    bad = bad_images("train", data, len(split.train_indices))
    transform = train_transform(data, augment, mean, std)
    images = Images(split.train, split.train_indices, transform, seed, bad, split.labelled)
    images.skippable = True
    if transform.jpeg is not None:
        _expect_files(images, transform.jpeg)
        images.of_file = transform.of_file
    return images


def _expect_files(images: Images, jpeg: JpegCrop) -> None:
    """Raises `UserError` if none of a few images is one that `data.decoder` can decode."""
    looked_at = images.indices[:: max(1, len(images) // LOOKED_AT)][:LOOKED_AT]
    for number in looked_at:
        with contextlib.suppress(BadImage):
            if jpeg.takes(images.source.content(number)):
                return
    raise UserError(
        f"data.decoder: simplejpeg decodes JPEG files, and none of {len(looked_at)} training images is one that it can "
        f"decode, such as {images.source.where(looked_at[0])}; use pillow"
    )


def validation_images(split: Split, data: Data, augment: Augment) -> Images:
    """The validation images, resized and cropped."""
    bad = bad_images("val", data, len(split.val_indices))
    images = Images(split.val, split.val_indices, eval_transform(data, augment), None, bad)
    images.skippable = True
    return images


def bad_images(part: str, data: Any, images: int) -> BadImages | None:
    """A record of unreadable images, or None if `data.on_bad_image` is not `skip`."""
    return BadImages(part, images, data.max_bad) if data.on_bad_image == "skip" else None


def train_batches(images: Images, sampler: TrainSampler, workers: int, pin: bool) -> Generator[Batch, None, None]:
    """The micro-batches of a run, from the sampler's first step to its last. Raises `UserError` for an unreadable image."""
    return checked(loaded(images, sampler, workers, pin, _collate), images.bad)


def eval_batches(
    images: Images, batch_size: int, workers: int, pin: bool, rank: int = 0, world: int = 1
) -> Generator[Batch, None, None]:
    """This rank's batches of all images, in order. Raises `UserError` for an unreadable image."""
    sampler = EvalSampler(len(images), batch_size, rank, world)
    return checked(loaded(images, sampler, workers, pin, _collate), images.bad)


def load_batch(images: Images, keys: list[Key]) -> Batch:
    """One batch, read in this process and equal to a loader's. Raises `UserError` for an unreadable image."""
    return next(checked([_collate([images[key] for key in keys])], images.bad))


class Checkable(Protocol):
    """A batch of any task: its images, and those that could not be read while making it."""

    @property
    def images(self) -> Sized: ...
    @property
    def skipped(self) -> Sequence[Bad]: ...


B = TypeVar("B", bound=Checkable)


def checked(batches: Iterable[B | UserError], bad: BadImages | None) -> Generator[B, None, None]:
    """The batches that have an image. Raises a `UserError` found in place of a batch, or if too many images are bad."""
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        if bad is not None:
            bad.add(batch.skipped)
        if len(batch.images):
            yield batch
