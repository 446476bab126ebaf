"""Finds validation images that are also training images: the same files, and files with the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from scalekd.common.seeds import seed_from

from .images import BadImage
from .sources.source import Source

MOST_BYTES = 2 * 10**9  # read at most to compare images; docs/how-to/data.md says what that costs
COPIES_ALLOWED = 0.1  # share of the validation images that may be copies of training images
SURE = 200  # so many equal images are decoded, to see whether they are images


class Copies(NamedTuple):
    """Pairs of equal images, and how many validation images were compared."""

    pairs: list[tuple[int, int]]  # (index of the validation image, of the training image)
    compared: int


def same_files(train: Source, train_indices: Sequence[int], val: Source, val_indices: Sequence[int]) -> list[int]:
    """The training images that are also validation images: the same file, also through a link to its folder."""
    held_out = {val.identity(i) for i in val_indices}
    return [i for i in train_indices if train.identity(i) in held_out]


def copies(train: Source, train_indices: Sequence[int], val: Source, val_indices: Sequence[int], seed: int) -> Copies:
    """The validation images whose bytes are those of a training image.

    Only images of equal sizes are read, and at most `MOST_BYTES`. If that is not enough for all, a part of the validation
    images is compared, chosen by `seed`. Images that cannot be read are not compared.
    """
    val_sizes = val.sizes()
    train_sizes = val_sizes if train is val else train.sizes()
    if val_sizes is None or train_sizes is None:
        return Copies([], 0)
    by_size: dict[int, list[int]] = {}
    for i in train_indices:
        by_size.setdefault(train_sizes[i], []).append(i)
    chosen = _affordable(by_size, val_sizes, val_indices, seed)
    digests: dict[tuple[int, bytes], int] = {}
    for size in sorted({val_sizes[i] for i in chosen} & by_size.keys()):
        for i in by_size[size]:
            if digest := _digest(train, i):
                digests.setdefault((size, digest), i)
    pairs: list[tuple[int, int]] = []
    for i in chosen:
        digest = _digest(val, i) if val_sizes[i] in by_size else None
        is_copy = digest is not None and (val_sizes[i], digest) in digests
        if is_copy and digest and (len(pairs) > SURE or _is_readable(val, i)):
            pairs.append((i, digests[val_sizes[i], digest]))
    return Copies(pairs, len(chosen))


def _is_readable(source: Source, i: int) -> bool:
    """Whether it is an image: damaged files, such as empty ones, are often equal."""
    try:
        source[i]
    except BadImage:
        return False
    return True


def _affordable(by_size: dict[int, list[int]], sizes: Sequence[int], indices: Sequence[int], seed: int) -> list[int]:
    """The validation images to compare, sorted: all, or as many as `MOST_BYTES` allow."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed_from("copies", seed))).tolist()
    chosen, known, spent = [], set[int](), 0
    for k in order:
        size = sizes[indices[k]]
        cost = 0 if size in known else size * len(by_size.get(size, ()))
        if size in by_size:
            cost += size
        if spent + cost > MOST_BYTES:
            continue
        known.add(size)
        spent += cost
        chosen.append(indices[k])
    return sorted(chosen)


def _digest(source: Source, i: int) -> bytes | None:
    try:
        return hashlib.blake2b(source.content(i), digest_size=16).digest()
    except BadImage:
        return None
