"""Batches of images with masks: random crops for training, whole images for evaluation.

As in `scalekd.data`, items are indexed by (epoch, index) and every random choice depends on (seed, epoch, index).
`pairs.py` opens the files.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from scalekd.common.errors import UserError
from scalekd.common.seeds import seed_everything
from scalekd.common.text import printable
from scalekd.data.batches import Batch, checked, dead_class, unreadable
from scalekd.data.fingerprint import Listing
from scalekd.data.images import Bad, BadImage, BadImages, of_channels
from scalekd.data.reading import Outage
from scalekd.data.samplers import EvalSampler, Key
from scalekd.data.transforms import Statistic
from scalekd.data.workers import loaded

from .pairs import IGNORED, Mask, Pairs

# ---------------------------------------------------------------- transforms


@dataclass(frozen=True)
class Crops:
    """Transforms of images and masks. The defaults are those for ADE20K in papers.

    Source: mmsegmentation, configs/_base_/datasets/ade20k.py and the transforms it names.
    """

    size: tuple[int, int] = (512, 512)  # height, width of a training crop in pixels
    scale: tuple[float, float] = (0.5, 2.0)  # training: range of a factor of the evaluation size
    most: float = 0.75  # largest share of one class in a crop, if ten tries find such a crop
    flip: float = 0.5  # probability of a horizontal flip
    photometric: bool = True
    channels: int = 3
    fill: Statistic = (0.485, 0.456, 0.406)  # value of padded pixels in [0, 1]: the backbone's mean


Pair = tuple[Tensor, Tensor]  # image (C, h, w) uint8, mask (H, W) uint8


def training_crop(image: Image.Image, mask: Mask, crops: Crops) -> Pair:
    """A random crop of a resized image, with random flip and colours, padded to `crops.size` with `fill` and `IGNORED`.

    Draws from torch's global generator.
    """
    pixels, classes = _tensors(image, mask, crops.channels)
    scale = crops.scale[0] + (crops.scale[1] - crops.scale[0]) * float(torch.rand(()))
    size = evaluation_size(image.height, image.width, crops.size, scale)
    # nearest-exact keeps the classes where bilinear keeps the pixels; nearest shifts them by half a pixel
    classes = F.interpolate(classes[None, None], size, mode="nearest-exact")[0, 0]
    pixels, classes = _cropped(resized(pixels, size), classes, crops)
    if torch.rand(()) < crops.flip:
        pixels, classes = pixels.flip(-1), classes.flip(-1)
    if crops.photometric:
        pixels = DISTORTION(pixels)
    return _padded(pixels, classes, crops)


def whole_image(image: Image.Image, mask: Mask, crops: Crops) -> Pair:
    """The image resized to its evaluation size, and the mask in its original size."""
    pixels, classes = _tensors(image, mask, crops.channels)
    return resized(pixels, evaluation_size(image.height, image.width, crops.size)), classes


def _tensors(image: Image.Image, mask: Mask, channels: int) -> Pair:
    return TF.pil_to_tensor(of_channels(channels, image)), torch.from_numpy(mask)


def evaluation_size(height: int, width: int, size: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    """Height and width after resizing: the short side min(size) * scale, the long side at most four times that.

    As mmsegmentation's scale (2048, 512) with crops of 512.
    """
    short = scale * min(size)
    factor = min(short / min(height, width), 4 * short / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, H, W) uint8 to (height, width) `size`, bilinear with antialiasing."""
    return TF.resize(pixels, list(size), v2.InterpolationMode.BILINEAR, antialias=True)


def _cropped(pixels: Tensor, classes: Tensor, crops: Crops) -> Pair:
    """A random crop of at most `crops.size`: the first of ten in which no class has more than `most`, else the last."""
    height, width = (min(side, most) for side, most in zip(classes.shape, crops.size))
    for _ in range(10):
        y = int(torch.randint(classes.shape[0] - height + 1, ()))
        x = int(torch.randint(classes.shape[1] - width + 1, ()))
        part = classes[y : y + height, x : x + width]
        counts = torch.bincount(part.flatten(), minlength=IGNORED + 1)[:IGNORED]
        if 0 < counts.max() < crops.most * counts.sum():
            break
    return pixels[:, y : y + height, x : x + width], part


def _padded(pixels: Tensor, classes: Tensor, crops: Crops) -> Pair:
    """Pads at the bottom and on the right."""
    height, width = classes.shape
    if (height, width) == crops.size:
        return pixels, classes
    whole = torch.full(crops.size, IGNORED, dtype=torch.uint8)
    canvas = (255 * torch.tensor(crops.fill)).round().to(torch.uint8).view(-1, 1, 1).repeat(1, *crops.size)
    whole[:height, :width], canvas[:, :height, :width] = classes, pixels
    return canvas, whole


def _half_the_time(**change: tuple[float, float]) -> v2.Transform:
    return v2.RandomApply([v2.ColorJitter(**change)], p=0.5)


# As in SSD (arXiv:1512.02325), with the ranges of mmsegmentation's PhotoMetricDistortion; contrast comes before or after
# the others. torchvision's RandomPhotometricDistort also swaps channels, which mmsegmentation's does not.
_LIGHT, _CONTRAST = _half_the_time(brightness=(1 - 32 / 255, 1 + 32 / 255)), _half_the_time(contrast=(0.5, 1.5))
_COLOUR = [_half_the_time(saturation=(0.5, 1.5)), _half_the_time(hue=(-0.1, 0.1))]
DISTORTION = v2.RandomChoice([v2.Compose([_LIGHT, _CONTRAST, *_COLOUR]), v2.Compose([_LIGHT, *_COLOUR, _CONTRAST])])


# ---------------------------------------------------------------- batches


class Sample(NamedTuple):
    pair: Pair | None  # None if no pair could be read
    skipped: Sequence[Bad] = ()


class SegmentationImages(Dataset):
    """Pairs indexed by (epoch, index), as `scalekd.data.batches.Images`: random crops with a seed, else whole images.

    A pair that cannot be used is returned as a `UserError`. With `bad`, it is skipped and recorded there; in training
    the next pair takes its place. A class without a readable pair is an error in any case.
    """

    def __init__(self, pairs: Pairs, crops: Crops, seed: int | None, bad: BadImages | None = None):
        self.pairs, self.crops, self.seed, self.bad = pairs, crops, seed, bad
        self.alive: set[int] = set()  # classes with bad pairs that have a readable one
        self.skippable = False  # whether there is a recipe that can say so, for the message

    def __len__(self) -> int:
        return len(self.pairs)

    def listed(self) -> Listing:
        """Names and files of the images and masks, for their fingerprint."""
        files = [str(file) for pair in zip(self.pairs.images, self.pairs.masks) for file in pair]
        labels = [self.pairs.reduce_zero_label] * len(self.pairs)
        return Listing(self.pairs.classes, labels, files, files, called=lambda i: self.pairs.where(i // 2))

    def __getitem__(self, key: Key) -> Sample | UserError:
        epoch, index = key
        if self.seed is not None:
            seed_everything(self.seed, epoch, index)
        transform = whole_image if self.seed is None else training_crop
        skipped: list[Bad] = []
        spare = self.bad.allowed if self.bad and self.seed is not None else 0
        for i in range(index, index + spare + 1):
            number = i % len(self)
            try:
                image, mask = self.pairs[number]
            except BadImage as error:
                if self.bad is None:
                    return UserError(
                        f"cannot use {self.pairs.where(number)}: {printable(str(error))}. Repair or remove the two files"
                        + ", or set data.on_bad_image=skip" * self.skippable
                    )
                if dead := self._dead_class(number):
                    return dead
                skipped.append(Bad(self.pairs.where(number), str(error)))
            except Outage as error:
                return error
            else:
                return Sample(transform(image, mask, self.crops), skipped)
        return Sample(None, skipped)

    def _dead_class(self, number: int) -> UserError | None:
        """The error if no pair with one of the classes in this bad pair can be read. Its mask must be readable."""
        return dead_class(
            self.pairs.labels(number),
            lambda label: (i for i in range(len(self)) if label in self.pairs.labels(i)),
            self.pairs.__getitem__,
            self.alive,
            lambda label: self.pairs.classes[label],
            "training" if self.seed is not None else "validation",
            self.pairs.where(number),
        )

    def still_bad(self, names: Iterable[str]) -> dict[str, str]:
        """The reason for each of these pairs that cannot be used. Raises `Outage`."""
        return unreadable(names, ((self.pairs.where(i), partial(self.pairs.__getitem__, i)) for i in range(len(self))))


def collate(samples: list[Sample | UserError]) -> list[Batch] | UserError:
    """Batches of consecutive samples of the same size: `images (B, C, h, w)`, `targets (B, H, W)`, both uint8.

    In training that is one batch; in evaluation images have different sizes. Returns the first error, if any.
    """
    runs: list[list[Pair]] = []
    skipped: list[Bad] = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        skipped += sample.skipped
        if sample.pair is None:
            continue
        if not runs or [t.shape for t in runs[-1][0]] != [t.shape for t in sample.pair]:
            runs.append([])
        runs[-1].append(sample.pair)
    batches = [Batch(torch.stack([p for p, _ in run]), torch.stack([m for _, m in run])) for run in runs]
    first, *rest = batches or [Batch(torch.empty(0), torch.empty(0))]
    return [first._replace(skipped=skipped), *rest]


def batches_of(images: SegmentationImages, sampler: Sampler, workers: int, pin: bool) -> Generator[Batch, None, None]:
    """The batches with the keys of `sampler`, a `TrainSampler` or `EvalSampler`. Raises `UserError`."""
    return checked(_flattened(loaded(images, sampler, workers, pin, collate)), images.bad)


def eval_batches(
    images: SegmentationImages, batch_size: int, workers: int, pin: bool, rank: int = 0, world: int = 1
) -> Generator[Batch, None, None]:
    return batches_of(images, EvalSampler(len(images), batch_size, rank, world), workers, pin)


def _flattened(collated: Iterable[list[Batch] | UserError]) -> Iterator[Batch | UserError]:
    for batches in collated:
        yield from [batches] if isinstance(batches, UserError) else batches
