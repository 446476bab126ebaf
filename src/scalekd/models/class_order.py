"""Reorders the outputs of a teacher whose classes are not in the data's order, such as that of timm's `train.py`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from timm.utils.misc import natural_key
from torch import nn

from scalekd.common.errors import UserError, nearest
from scalekd.common.text import counted, printable, shortened

from .weights.match import classifier

SHORT = 12  # messages list an order of at most this many classes


def natural(names: Sequence[str]) -> list[str] | None:
    """The names in timm's order of class folders: case-insensitive, with numbers by value.

    None if this order is ambiguous, for names that differ only in case or leading zeros: `Cat` and `cat`, `1` and `01`.
    """
    try:
        keys = sorted(natural_key(name) for name in names)
        return sorted(names, key=natural_key) if all(a < b for a, b in pairwise(keys)) else None
    except (TypeError, ValueError):  # raised by timm's key for digits such as superscripts
        return None


def teachers_order(chosen: str | Sequence[str], ours: Sequence[str], where: str) -> list[str]:
    """The class names in the teacher's order. Raises `UserError` if `chosen` does not fit the data.

    chosen: the recipe's `classes`, `natural` or a list of names. ours: the data's class names. where: recipe key of the
    teacher.
    """
    if isinstance(chosen, str):
        theirs = natural(ours)
        if theirs is None:
            raise UserError(
                f"{where}.classes: `natural` is ambiguous here, because some class names differ only in case or leading zeros; "
                "list all names in the teacher's order"
            )
        return theirs
    unknown = [name for name in chosen if name not in ours]
    twice = [name for name, count in Counter(chosen).items() if count > 1]
    missing = [name for name in ours if name not in chosen]
    if unknown:
        hint = printable(nearest(unknown[0], missing or ours))
        raise UserError(f"{where}.classes: the data has no class {shortened(unknown[0])}.{hint}")
    if twice or missing:
        fault = f"{twice[0]} is listed twice" if twice else f"{missing[0]} is missing"
        raise UserError(f"{where}.classes: list each of the data's {len(ours)} classes once; {shortened(fault)}")
    return list(chosen)


def rows(theirs: Sequence[str], ours: Sequence[str]) -> list[int]:
    """For each of our classes its index in theirs."""
    index = {name: i for i, name in enumerate(theirs)}
    return [index[name] for name in ours]


def put_in_order(model: nn.Module, chosen: str | Sequence[str], ours: Sequence[str], where: str) -> None:
    """Reorders the rows of a teacher's classifier, in place, so that its logits are in the order of `ours`.

    Raises `UserError`, also for a model without a linear classifier.
    """
    count, head = getattr(model, "num_classes", 0), classifier(model)
    if count and count != len(ours):
        raise UserError(
            f"{where}.classes: the teacher has {counted(count, 'output')} and the data {len(ours)} classes; remove it"
        )
    if not count or not head or any(tensor.ndim == 0 or len(tensor) != count for tensor in head.values()):
        raise UserError(f"{where}.classes: {type(model).__name__} has no linear classifier to reorder; remove this key")
    order = torch.tensor(rows(teachers_order(chosen, ours, where), ours))
    for tensor in head.values():  # they share the parameters' memory
        tensor.copy_(tensor[order.to(tensor.device)])


def remedy(theirs: Sequence[str], ours: Sequence[str], where: str) -> str:
    """How to set `classes` for a teacher with its classes in this order."""
    if list(theirs) == natural(ours):
        return f"set {where}.classes=natural, the order of timm's train.py"
    if len(theirs) > SHORT:
        return f"set {where}.classes to the names in that order"
    as_yaml = ", ".join(json.dumps(name, ensure_ascii=False) for name in theirs)
    return f"set {where}.classes='[{as_yaml}]'"
