"""Which images train and which validate."""

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

REST = "rest"  # `data.unlabelled`: what `data.limit` leaves out of `data.train`


# ---------------------------------------------------------------- the data of a run


class Split(NamedTuple):
    """Which images of which source a run trains on and validates on; those without labels follow those with."""

    classes: list[str]
    train: Source
    train_indices: Sequence[int]
    val: Source
    val_indices: Sequence[int]
    labelled: int  # of train_indices


def open_split(data: Data) -> Split:
    """Opens the sources of a run. Raises `UserError` for missing folders, empty classes, unequal class lists."""
    if data.train is None:
        return _with_unlabelled(None, data)
    train = open_source(data.train, "data.train")
    unused = sorted(set(range(len(train.classes))) - set(train.targets)) if _numbered(train.classes) else []
    if unused:
        raise UserError(
            f"data.train has labels up to {max(train.targets)} and no image of class {unused[0]}"
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
                f"data.train has {len(train)} images, too few to hold out {held} for validation; name a data.val"
            )
    kept, left = sorted(order[: data.limit]), sorted(order[len(order) if data.limit is None else data.limit :])
    split = Split(list(train.classes), train, kept, val, val_indices, len(kept))
    return split if data.unlabelled is None else _with_unlabelled(split, data, left)


def _with_unlabelled(split: Split | None, data: Data, left: Sequence[int] = ()) -> Split:
    """`split` with the images of `data.unlabelled`, or these alone. left: of the labelled source, what is not used."""
    assert data.unlabelled is not None
    if data.unlabelled == REST:
        assert split is not None
        unlabelled: Source = WithoutLabels(split.train)
        indices = left
    else:
        unlabelled = open_unlabelled(data.unlabelled, "data.unlabelled")
        indices = range(len(unlabelled))
    if data.unlabelled_limit is not None:
        generator = torch.Generator().manual_seed(seed_from("unlabelled", data.seed))
        chosen = torch.randperm(len(indices), generator=generator)[: data.unlabelled_limit]
        indices = sorted(indices[i] for i in chosen.tolist())
    if not indices:
        left_out = "rest: data.limit leaves out no image of data.train; lower it"
        raise UserError(f"data.unlabelled: {left_out if data.unlabelled == REST else 'it holds no images'}")
    if split is None:
        assert data.val is not None
        val = open_source(data.val, "data.val")
        split = Split(list(val.classes), unlabelled, indices, val, range(len(val)), 0)
    else:
        behind = [len(split.train) + i for i in indices]
        split = split._replace(train=Joined(split.train, unlabelled), train_indices=[*split.train_indices, *behind])
    _refuse_seen(split)
    return split


def _refuse_seen(split: Split) -> None:
    """Validation images must not be trained on, with or without their labels."""
    held = {split.val.identity(i) for i in split.val_indices}
    seen = [i for i in split.train_indices[split.labelled :] if split.train.identity(i) in held]
    if seen:
        raise UserError(
            f"data.unlabelled holds {len(seen)} of the validation images, such as {split.train.where(seen[0])}. Name a source without "
            "them; `data.unlabelled: rest` takes what data.limit leaves out of data.train"
        )


def same_classes(known: Sequence[str], found: Sequence[str]) -> bool:
    """Equal; or numbers from 0, worked out from labels, of which `found` need not have the highest."""
    return list(found) == list(known[: len(found)] if _numbered(known) else known)


def _numbered(classes: Sequence[str]) -> bool:
    return list(classes) == [str(i) for i in range(len(classes))]


def by_class(targets: Sequence[int], seed: int) -> list[int]:
    """A seeded order of all indices in which every prefix holds the classes as evenly as can be."""
    generator = torch.Generator().manual_seed(seed_from("by class", seed))
    shuffled = torch.randperm(len(targets), generator=generator).tolist()
    seen: dict[int, int] = {}
    turns = []
    for i in shuffled:
        turns.append((seen.setdefault(targets[i], 0), i))
        seen[targets[i]] += 1
    return [i for _, i in sorted(turns, key=lambda turn: turn[0])]
