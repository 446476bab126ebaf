"""Recipe sections `data` and `augment`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import (
    Field,
    field_validator,
)

from scalekd.common.sections import CropShare, ImageSize, Interpolation, Positive, Section, Seed, Share, Workers
from scalekd.common.text import printable


class Data(Section):
    train: str | None = None
    """Training images: a folder with one sub-folder per class, or another source (docs/how-to/data.md)."""
    val: str | None = None
    """Validation images, in the same forms. By default `val_fraction` of `train` is held out."""
    unlabelled: str | None = None
    """Training images without labels: a folder or another source, whose labels are ignored if it has any; or `rest`,
    the part of `train` that `limit` leaves (docs/how-to/unlabelled.md)."""
    unlabelled_limit: Positive | None = None
    """Maximum number of unlabelled images, chosen by `seed`. By default all."""
    unlabelled_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Fraction of unlabelled images in each batch, if there are also labelled ones."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of `train` that is held out for validation if `val` is not set."""
    limit: Positive | None = None
    """Maximum number of training images, the same number per class, chosen by `seed`. By default all."""
    seed: Seed = 0
    """Chooses the held-out images and those of `limit`. It is not the seed of the run, so that runs with different seeds
    have the same data."""
    class_balance: Share = 0.0
    """Draw images of rare classes more often in training: an image of a class with n images is drawn in proportion to
    n ** -class_balance. 0: as they are; 0.5: square root; 1: all classes equally often (docs/how-to/labels.md)."""
    image_size: ImageSize = 224
    """Input size of the student in pixels, square or (height, width)."""
    channels: Literal[1, 3] = 3
    """Channels of the images: 3 for RGB, 1 for greyscale."""
    decoder: Literal["pillow", "simplejpeg"] = "pillow"
    """What decodes training images. `simplejpeg` takes about two thirds of the time for JPEG files, and their pixels differ by
    rounding. Other files and all validation images use Pillow (docs/how-to/data.md)."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What to do with an image that cannot be read: stop and name it, or skip it and list it in the run's folder."""
    max_bad: Share = 0.01
    """With `on_bad_image: skip`, stop if more than this fraction of the images is unreadable (docs/how-to/data.md)."""
    workers: Workers = "auto"
    """Processes that load images, per training process. 0: load them in the training process. auto: one less than the
    process's cores for a GPU, at most 8; half of the cores for a CPU, at most 4."""


class Augment(Section):
    crop: Literal["random_resized", "pad", "none"] = "random_resized"
    """Random crop: of random size and aspect ratio, of `image_size` after zero padding, or none."""
    scale: tuple[Share, Share] = (0.08, 1.0)
    """With `crop: random_resized`, range of the crop's area as a fraction of the image's."""
    pad: Annotated[int, Field(ge=0, lt=2**16)] = 4
    """With `crop: pad`, pixels of zero padding on each side."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""
    color_jitter: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Strength of random changes of brightness, contrast and saturation, as in timm."""
    auto_augment: str | None = None
    """Augmentation policy in timm's notation, such as rand-m7-mstd0.5."""

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
                raise ValueError(f"timm would ignore `{'-'.join(ignored)}`")
        except (AssertionError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"timm cannot read `{printable(policy)}` ({printable(str(error) or type(error).__name__)}); "
                "use timm's notation, such as rand-m7-mstd0.5"
            ) from None
        return policy

    repeats: Positive = 1
    """Repeated augmentation (arXiv:1901.09335): number of copies of each image in a batch. An epoch then uses one in
    `repeats` of the images."""
    erase: Share = 0.0
    """Probability of random erasing. The area is filled with normal noise in the student's normalised pixels."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of Mixup; 0 for none."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of CutMix; 0 for none. If both are set, each batch uses one of the two at random."""
    interpolation: Interpolation = "bicubic"
    """How images are resized, in training and validation."""
    crop_pct: CropShare = 0.875
    """Validation images are resized to image_size / crop_pct and centre-cropped to image_size."""
