"""Opens the data sources of a run and splits them into training and validation images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from scalekd.common.errors import UserError
from scalekd.common.seeds import seed_from
from scalekd.common.text import printable

from .options import Data
from .sources.open import open_source, open_unlabelled
from .sources.source import Source
from .sources.unlabelled import Joined, WithoutLabels

REST = "rest"  # value of `data.unlabelled`: the images that `data.limit` leaves out of `data.train`


class Split(NamedTuple):
    """The images that a run trains on and validates on; training images without labels come last."""

    classes: list[str]
    train: Source
    train_indices: Sequence[int]
    val: Source
    val_indices: Sequence[int]
    labelled: int  # how many of train_indices have labels; they come first


def open_split(data: Data) -> Split:
    """Opens the sources of a run. Raises `UserError`, for example for missing folders, empty classes or unequal classes."""
    if data.train is None:
        return _with_unlabelled(None, data)
    train = open_source(data.train, "data.train")
    unused = sorted(set(range(len(train.classes))) - set(train.targets)) if _numbered(train.classes) else []
    if unused:
        raise UserError(
            f"data.train has labels up to {max(train.targets)}, but no image of class {unused[0]}"
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
                f"data.train has {len(train)} images, too few to hold out {held} for validation; set data.val"
            )
    kept, unused_indices = (
        sorted(order[: data.limit]),
        sorted(order[len(order) if data.limit is None else data.limit :]),
    )
    split = Split(list(train.classes), train, kept, val, val_indices, len(kept))
    return split if data.unlabelled is None else _with_unlabelled(split, data, unused_indices)


def _with_unlabelled(split: Split | None, data: Data, rest: Sequence[int] = ()) -> Split:
    """Adds the images of `data.unlabelled` to `split`, or makes a split of them alone.

    rest: indices of the labelled images that `data.limit` leaves out.
    """
    assert data.unlabelled is not None
    if data.unlabelled == REST:
        assert split is not None
        unlabelled: Source = WithoutLabels(split.train)
        indices = rest
    else:
        unlabelled = open_unlabelled(data.unlabelled, "data.unlabelled")
        indices = range(len(unlabelled))
    if data.unlabelled_limit is not None:
        generator = torch.Generator().manual_seed(seed_from("unlabelled", data.seed))
        chosen = torch.randperm(len(indices), generator=generator)[: data.unlabelled_limit]
        indices = sorted(indices[i] for i in chosen.tolist())
    if not indices:
        no_rest = "rest: data.limit leaves out no image of data.train; lower it"
        raise UserError(f"data.unlabelled: {no_rest if data.unlabelled == REST else 'has no images'}")
    if split is None:
        assert data.val is not None
        val = open_source(data.val, "data.val")
        split = Split(list(val.classes), unlabelled, indices, val, range(len(val)), 0)
    else:
        appended = [len(split.train) + i for i in indices]
        split = split._replace(train=Joined(split.train, unlabelled), train_indices=[*split.train_indices, *appended])
    _reject_validation_images(split)
    return split


def _reject_validation_images(split: Split) -> None:
    """Raises `UserError` if validation images are among the unlabelled training images."""
    held_out = {split.val.identity(i) for i in split.val_indices}
    shared = [i for i in split.train_indices[split.labelled :] if split.train.identity(i) in held_out]
    if shared:
        raise UserError(
            f"data.unlabelled contains {len(shared)} of the validation images, such as {split.train.where(shared[0])}. "
            "Choose a source without them; `data.unlabelled: rest` uses the images that data.limit leaves out of data.train"
        )


def same_classes(known: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two lists of classes are equal. Numbered classes come from labels, so `other` may lack the highest ones."""
    return list(other) == list(known[: len(other)] if _numbered(known) else known)


def _numbered(classes: Sequence[str]) -> bool:
    return list(classes) == [str(i) for i in range(len(classes))]


def by_class(targets: Sequence[int], seed: int) -> list[int]:
    """A seeded order of all indices in which every prefix is as balanced over the classes as possible."""
    generator = torch.Generator().manual_seed(seed_from("by class", seed))
    shuffled = torch.randperm(len(targets), generator=generator).tolist()
    count: dict[int, int] = {}  # images of each class so far
    turns = []
    for i in shuffled:
        turns.append((count.setdefault(targets[i], 0), i))
        count[targets[i]] += 1
    return [i for _, i in sorted(turns, key=lambda turn: turn[0])]
