"""Refuses validation images that are training images, for detection and segmentation."""

from __future__ import annotations

from collections.abc import Sequence

from scalekd.common.errors import UserError
from scalekd.common.text import printable
from scalekd.data.overlap import COPIES_ALLOWED, copies, same_files
from scalekd.data.sources.unlabelled import Loose


def refuse_shared(train: Sequence[str], val: Sequence[str], fix: str) -> list[str]:
    """Notes on validation images that are copies of training images.

    train, val: files. fix: what to do, for the message. Raises `UserError` if both have a file, or if more than
    `COPIES_ALLOWED` of the validation images are copies.
    """
    parts = Loose(train, train), range(len(train)), Loose(val, val), range(len(val))
    if same := same_files(*parts):
        raise UserError(
            f"{len(same)} of the validation images are also training images, such as {printable(train[same[0]])}; {fix}"
        )
    found, compared = copies(*parts, seed=0)
    if not found:
        return []
    example = printable(f"{val[found[0][0]]} is {train[found[0][1]]}")
    if len(found) > COPIES_ALLOWED * compared:
        raise UserError(f"{len(found)} of {compared} validation images are copies of training images: {example}; {fix}")
    return [f"{len(found)} of {compared} validation images are copies of training images: {example}"]
