"""Opens the data sources of a run and splits them into training and validation images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from scalekd.common.errors import UserError
from scalekd.common.seeds import seed_from
from scalekd.common.text import printable

from .description import classes_of, part
from .options import Data
from .overlap import COPIES_ALLOWED, copies, same_files
from .sources.folders import class_folders
from .sources.names import split_of
from .sources.open import open_source, open_unlabelled
from .sources.source import Source
from .sources.table.text import is_table
from .sources.unlabelled import Joined, WithoutLabels
from .targets import Target, are_sets, balancing_weights, count_of, rarest

MOST_EXAMPLES = 10  # images that an error lists
REST = "rest"  # value of `data.unlabelled`: the images that `data.limit` leaves out of `data.train`


class Split(NamedTuple):
    """The images that a run trains on and validates on; training images without labels come last."""

    classes: list[str]
    train: Source
    train_indices: Sequence[int]
    val: Source
    val_indices: Sequence[int]
    labelled: int  # how many of train_indices have labels; they come first
    described: Mapping[str, Any] = MappingProxyType({})  # as `scalekd.data.description` makes it

    @property
    def multi_label(self) -> bool:
        """Whether the target of an image is a set of classes."""
        return are_sets(self.val.targets)


def open_split(data: Data, strict: bool = True) -> Split:
    """Opens the sources of a run. Raises `UserError`, for example for missing folders, empty classes or unequal classes.

    strict: raise also if validation images are training images. False is for a run that was trained so earlier.
    """
    split = _opened(data) if data.train is not None else _with_unlabelled(None, data)
    if len(split.classes) < 2:
        raise UserError(
            f"data.{'train' if data.train else 'val'} has a single class, {printable(', '.join(split.classes))}: nothing "
            "can be learned"
            + ("" if is_table(data.train or "") else ". Name the folder whose sub-folders are the classes")
            + _lower(data.train or data.val)
        )
    split, notes = _without_copies(split, data, strict)
    return split._replace(described=_described(split, data) | {"notes": notes + _balance_note(split, data)})


def _lower(text: str | None) -> str:
    """A hint at a folder with class folders one level below."""
    root = Path(text or "").expanduser()
    names = class_folders(root) if text and root.is_dir() else []
    below = [root / name for name in names if len(class_folders(root / name)) > 1]
    return f", such as {printable(str(below[0]))}" if below else ""


def _opened(data: Data) -> Split:
    """The split of labelled training images and validation images, with `data.unlabelled` if it is set."""
    assert data.train is not None
    train = open_source(data.train, "data.train")
    unused = sorted(set(range(len(train.classes))) - count_of(train.targets).keys()) if _numbered(train.classes) else []
    if unused:
        raise UserError(
            f"data.train has labels up to {len(train.classes) - 1}, but no image of class {unused[0]}"
            + (f" and {len(unused) - 1} others" if unused[1:] else "")
            + ". Number the classes from 0 without gaps."
        )
    order = by_class(train.targets, data.seed)
    if data.val is not None:
        val = open_source(data.val, "data.val", train.classes)
        val_indices: Sequence[int] = range(len(val))
        _refuse_other_kind(train, val)
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


def _refuse_other_kind(train: Source, val: Source) -> None:
    """Raises `UserError` if the images of one source have sets of labels and those of the other have one label each."""
    if are_sets(train.targets) != are_sets(val.targets):
        several, one = ("data.train", "data.val") if are_sets(train.targets) else ("data.val", "data.train")
        raise UserError(
            f"{several} has several labels per image and {one} one label per image. Give both the same kind of labels: "
            "`labels=several` (or `separator`) makes the labels of a table sets (`scalekd docs labels`)"
        )


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
    return split


def _without_copies(split: Split, data: Data, strict: bool) -> tuple[Split, list[str]]:
    """The split without validation images that equal training images, and notes for the description.

    Raises `UserError` if they are the same files, or more than `COPIES_ALLOWED` of them are copies; not if not `strict`.
    """
    parts = split.train, split.train_indices, split.val, split.val_indices
    same = same_files(*parts)
    if same and strict:
        _refuse_same(split, data, same)
    if same:
        return split, [f"{len(same)} training images are also validation images"]
    found, compared = copies(*parts, data.seed)
    example = f"{split.val.where(found[0][0])} is {split.train.where(found[0][1])}" if found else ""
    if len(found) > COPIES_ALLOWED * compared:
        if strict:
            raise UserError(
                f"{len(found)} of {compared} validation images are copies of training images: {example}. "
                + ("Set data.val to other images" if data.val else "Remove the copies, or set data.val to other images")
            )
        return split, [f"{len(found)} validation images are copies of training images: {example}"]
    total, notes = len(split.val_indices), []
    if compared < total:
        notes.append(f"{compared} of {total} validation images were compared with the training images by their bytes")
    if found:
        notes.append(f"left out of validation: {len(found)} duplicates of training images; {example}")
        copied = {i for i, _ in found}
        split = split._replace(val_indices=[i for i in split.val_indices if i not in copied])
    return split, notes


def _refuse_same(split: Split, data: Data, same: list[int]) -> None:
    labelled = split.train_indices[: split.labelled]
    example = ", ".join(split.train.where(i) for i in same[:MOST_EXAMPLES])
    example += f" and {len(same) - MOST_EXAMPLES} others" * (len(same) > MOST_EXAMPLES)
    if same[0] in set(labelled):
        raise UserError(
            f"{len(same)} of the validation images are also training images, such as {example}. Set data.val to other "
            "images, or leave it out to hold out a part of data.train"
        )
    raise UserError(
        f"data.unlabelled contains {len(same)} of the validation images, such as {example}. "
        "Choose a source without them; `data.unlabelled: rest` uses the images that data.limit leaves out of data.train"
    )


def _described(split: Split, data: Data) -> dict[str, Any]:
    """What the commands print before they start and keep; see `scalekd.data.description`."""
    targets = split.train.targets
    labelled = [targets[i] for i in split.train_indices[: split.labelled]]
    described: dict[str, Any] = {}
    if data.train is not None:
        first = split.train.labelled if isinstance(split.train, Joined) else split.train
        limited = f"{data.limit} by data.limit, seed {data.seed}" if split.labelled == data.limit else ""
        described["training"] = part(split.labelled, data.train, limited, first.left_out)
    if rest := len(split.train_indices) - split.labelled:
        source = split.train.unlabelled if isinstance(split.train, Joined) else split.train
        left_out = {} if data.unlabelled == REST else source.left_out
        described["unlabelled"] = part(rest, str(data.unlabelled), "without labels", left_out)
    held = f"held out: {data.val_fraction:.0%} of the images, balanced by class, seed {data.seed}"
    if any(split_of(name) == "train" for name in re.split("[/:]", str(data.train))):
        held += "; a test part, if there is one, is not used, because test images must not choose the checkpoint"
    chosen = "data.val" if data.val else held
    described["validation"] = part(
        len(split.val_indices), str(data.val or data.train), chosen, split.val.left_out if data.val else {}
    )
    counted_on = labelled or [split.val.targets[i] for i in split.val_indices]
    return described | {"classes": classes_of(split.classes, counted_on)}


def drawing_weights(split: Split, data: Data) -> list[float] | None:
    """How often to draw each labelled training image, relative to the others; None if all equally often."""
    if not data.class_balance or not split.labelled:
        return None
    return balancing_weights(
        [split.train.targets[i] for i in split.train_indices[: split.labelled]], data.class_balance
    )


def _balance_note(split: Split, data: Data) -> list[str]:
    """How often an image is drawn in an epoch, at most and at least, if `data.class_balance` is set."""
    if (weights := drawing_weights(split, data)) is None:
        return []
    often = [len(weights) * weight / sum(weights) for weight in (max(weights), min(weights))]
    return [
        f"data.class_balance {data.class_balance:g}: in an epoch, an image of the rarest class is drawn "
        f"{often[0]:.2g} times on average, one of the most frequent class {often[1]:.2g} times"
    ]


def same_classes(known: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two lists of classes are equal. Numbered classes come from labels, so `other` may lack the highest ones."""
    return list(other) == list(known[: len(other)] if _numbered(known) else known)


def class_difference(known: Sequence[str], other: Sequence[str]) -> str:
    """How `other` differs from the `known` classes, for an error: `it has Blouse and lacks Shirt`."""
    had, lacked = (_some([name for name in a if name not in set(b)]) for a, b in ((other, known), (known, other)))
    told = " and ".join(f"{verb} {names}" for verb, names in (("has", had), ("lacks", lacked)) if names)
    return f"it {told}" if told else "it has them in another order"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4)


def _numbered(classes: Sequence[str]) -> bool:
    return list(classes) == [str(i) for i in range(len(classes))]


def by_class(labels: Sequence[Target], seed: int) -> list[int]:
    """A seeded order of all indices in which every prefix is as balanced over the classes as possible.

    An image with several classes counts for the rarest of them.
    """
    targets = rarest(labels)
    generator = torch.Generator().manual_seed(seed_from("by class", seed))
    shuffled = torch.randperm(len(targets), generator=generator).tolist()
    count: dict[int, int] = {}  # images of each class so far
    turns = []
    for i in shuffled:
        turns.append((count.setdefault(targets[i], 0), i))
        count[targets[i]] += 1
    return [i for _, i in sorted(turns, key=lambda turn: turn[0])]
