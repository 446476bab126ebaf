"""The recipe sections `data` and `augment`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from scalekd.common.sections import CropShare, ImageSize, Interpolation, Positive, Section, Seed, Share
from scalekd.common.text import printable


class Data(Section):
    """Which images to use and how to read them."""

    train: str | None = None
    """Training images: a folder with one sub-folder per class, or a named source (docs/how-to/data.md)."""
    val: str | None = None
    """Validation images, in the same forms. By default `val_fraction` of `train` is held out."""
    unlabelled: str | None = None
    """Training images without labels: a folder or a named source, whose labels are ignored if it has any; or `rest`,
    the images that `limit` leaves out of `train` (docs/how-to/unlabelled.md)."""
    unlabelled_limit: Positive | None = None
    """Use only this many unlabelled images, chosen by `seed`."""
    unlabelled_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of unlabelled images in every batch."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of `train` to hold out if there is no `val`."""
    limit: Positive | None = None
    """Use only this many training images, balanced over the classes, chosen by `seed`."""
    seed: Seed = 0
    """Seed that chooses the held-out images and the `limit`. Runs of different `seed` of the recipe share their data."""
    image_size: ImageSize = 224
    """The student's input size in pixels: one number for a square, or (height, width)."""
    channels: Literal[1, 3] = 3
    on_bad_image: Literal["error", "skip"] = "error"
    """For an image that cannot be read: stop and name it, or skip it and list it in the run's folder."""
    max_bad: Share = 0.01
    """`on_bad_image: skip` stops the run if more than this share of the images is bad (docs/how-to/data.md)."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 4
    """Processes that read images; 0 reads them in the training process."""


class Augment(Section):
    """Augmentation of the training images, and the crop for validation."""

    crop: Literal["random_resized", "pad", "none"] = "random_resized"
    scale: tuple[Share, Share] = (0.08, 1.0)
    """Range of the cropped share of the area, for `crop: random_resized`."""
    pad: Annotated[int, Field(ge=0, lt=2**16)] = 4
    """Pixels of zero padding on each side for `crop: pad`, which then crops to `image_size`."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""
    color_jitter: Annotated[float, Field(ge=0, le=100)] = 0.0
    auto_augment: str | None = None
    """AutoAugment policy in timm's notation, such as rand-m7-mstd0.5."""
    repeats: Positive = 1
    """Repeated augmentation (arXiv:1901.09335): each image occurs this many times in a batch, and an epoch visits
    1 / `repeats` of the images."""
    erase: Share = 0.0
    """Probability of random erasing, which fills with normal noise in the student's normalised space."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    interpolation: Interpolation = "bicubic"
    crop_pct: CropShare = 0.875
    """For validation: the image is resized to image_size / crop_pct and its centre is cropped."""

    @field_validator("auto_augment")
    @classmethod
    def _readable(cls, policy: str | None) -> str | None:
        from timm.data import create_transform

        if policy is None:
            return None
        try:
            create_transform(32, is_training=True, auto_augment=policy)
            ignored = [part for part in policy.split("-")[1:] if not re.match(r"t|[a-z]+\d", part)]
            if ignored or not policy:
                raise ValueError(f"it would ignore `{'-'.join(ignored)}`")
        except (AssertionError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"timm cannot read `{printable(policy)}` ({printable(str(error) or type(error).__name__)}); "
                "write for example rand-m7-mstd0.5"
            ) from None
        return policy
