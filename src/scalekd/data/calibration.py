"""Chooses training images for a quantiser's ranges, and others to compare its methods on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from scalekd.common.errors import UserError
from scalekd.common.seeds import seed_from

from .split import Split, by_class

FEWEST_IMAGES = 32  # below, a range is that of a few images
MOST_TO_COMPARE = 1000


class Calibration(NamedTuple):
    """Numbers of training images of a source, apart from each other and from the validation images."""

    ranges: list[int]  # to measure ranges on
    comparison: list[int]  # to choose a method by


def calibration_split(split: Split, images: int, seed: int) -> Calibration:
    """`images` training images for the ranges, or three quarters of few ones, and up to 1,000 others to compare on.

    Both are balanced by class; without labels they are chosen at random. Raises `UserError` for fewer than 32 images.
    """
    labelled = list(split.train_indices[: split.labelled])
    pool = labelled or list(split.train_indices)
    if len(pool) <= FEWEST_IMAGES:
        raise UserError(
            f"{len(pool)} training images are too few to calibrate with: more than {FEWEST_IMAGES} are needed. Name more "
            "images of the same classes with `data`"
        )
    if labelled:
        order = by_class([split.train.targets[i] for i in pool], seed)
    else:
        generator = torch.Generator().manual_seed(seed_from("calibration", seed))
        order = torch.randperm(len(pool), generator=generator).tolist()
    ranges = max(FEWEST_IMAGES, min(images, 3 * len(pool) // 4))
    chosen = [pool[i] for i in order]
    return Calibration(sorted(chosen[:ranges]), sorted(chosen[ranges : ranges + MOST_TO_COMPARE]))
