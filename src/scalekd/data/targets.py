"""What the target of an image is: one class, or the set of its classes in multi-label data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from scalekd.common.errors import UserError

Target = int | tuple[int, ...]  # a class, -1 for an image without a label; or the sorted classes of an image


def are_sets(targets: Sequence[Target]) -> bool:
    """Whether the images of a labelled source have sets of classes. The labelled images of a source come first."""
    return bool(len(targets)) and isinstance(targets[0], tuple)


def classes_in(target: Target) -> tuple[int, ...]:
    """The classes of an image; () if it has none, or no label."""
    if isinstance(target, tuple):
        return target
    return (target,) if target >= 0 else ()


def multi_hot(target: tuple[int, ...], classes: int) -> Tensor:
    """A set of classes as (classes,) float32 of 0 and 1."""
    row = torch.zeros(classes)
    row[list(target)] = 1
    return row


def as_tensor(targets: Sequence[Target], classes: int) -> Tensor:
    """The targets of labelled images: classes (N,) int64, or sets of classes (N, classes) float32 of 0 and 1."""
    if are_sets(targets):
        return torch.stack([multi_hot(classes_in(target), classes) for target in targets])
    return torch.tensor(targets)


def rarest(targets: Sequence[Target]) -> list[int]:
    """For each image, that of its classes which has the fewest images; -1 if it has none.

    An order or a sample that is balanced over these classes has images of all of them, however rare they are.
    """
    if not are_sets(targets):
        return list(cast("Sequence[int]", targets))
    images = count_of(targets)
    return [min(classes_in(t), key=lambda c: (images[c], c), default=-1) for t in targets]


def count_of(targets: Sequence[Target]) -> Counter[int]:
    """The number of images of each class. An image with several classes counts for each."""
    return Counter(label for target in targets for label in classes_in(target))


def balancing_weights(targets: Sequence[Target], balance: float) -> list[float]:
    """How often to draw each image, relative to the others: `n ** -balance` for an image of a class with n images.

    0 draws all images equally often, 1 all classes, 0.5 is square-root sampling (arXiv:1805.00932). An image
    with several classes counts for the rarest, as in the repeat factors of arXiv:1908.03195, one with none for the largest.
    """
    images = count_of(targets)
    most = max(images.values(), default=1)
    return [(images[label] if label >= 0 else most) ** -balance for label in rarest(targets)]


def one_each(targets: Sequence[Target], what: str) -> list[int]:
    """`targets`, if no image has a set of classes. Raises `UserError` otherwise.

    what: what needs one class per image, for the message.
    """
    if are_sets(targets):
        raise UserError(
            f"{what} needs one class per image, and these images have sets of labels (`scalekd docs labels`)"
        )
    return list(cast("Sequence[int]", targets))
