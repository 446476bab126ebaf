"""A teacher with the data's classes in an order of its own, such as that of timm's `train.py`."""

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

SHORT = 12  # classes up to which a message writes out an order


def natural(names: Sequence[str]) -> list[str] | None:
    """timm's order of class folders: in lower case, numbers as numbers. None where it leaves the order open.

    It does for names that differ in case or leading zeros alone: `Cat` and `cat`, `1` and `01`.
    """
    try:
        keys = sorted(natural_key(name) for name in names)
        return sorted(names, key=natural_key) if all(a < b for a, b in pairwise(keys)) else None
    except (TypeError, ValueError):  # what timm's key ends with for digits such as a superscript alone
        return None


def teachers_order(chosen: str | Sequence[str], ours: Sequence[str], where: str) -> list[str]:
    """The names of a teacher's classes in its order, from a recipe's `classes`. Raises `UserError`.

    chosen: `natural`, or the names. ours: those of the data. where: of the teacher in the recipe.
    """
    if isinstance(chosen, str):
        theirs = natural(ours)
        if theirs is None:
            raise UserError(
                f"{where}.classes: natural is no order of these class names, of which some are equal but for case or "
                "leading zeros; list them in the teacher's order"
            )
        return theirs
    unknown = [name for name in chosen if name not in ours]
    twice = [name for name, count in Counter(chosen).items() if count > 1]
    missing = [name for name in ours if name not in chosen]
    if unknown:
        hint = printable(nearest(unknown[0], missing or ours))
        raise UserError(f"{where}.classes: the data has no class {shortened(unknown[0])}.{hint}")
    if twice or missing:
        told = f"{twice[0]} stands there twice" if twice else f"{missing[0]} is missing"
        raise UserError(f"{where}.classes: the data's {len(ours)} classes are needed, each once; {shortened(told)}")
    return list(chosen)


def rows(theirs: Sequence[str], ours: Sequence[str]) -> list[int]:
    """For each of our classes its place among theirs."""
    places = {name: i for i, name in enumerate(theirs)}
    return [places[name] for name in ours]


def put_in_order(model: nn.Module, chosen: str | Sequence[str], ours: Sequence[str], where: str) -> None:
    """Moves the rows of a teacher's classifier so that its logits are in the order of `ours`. Raises `UserError`."""
    count, head = getattr(model, "num_classes", 0), classifier(model)
    if count and count != len(ours):
        raise UserError(f"{where}.classes: the teacher has {counted(count, 'output')}, the data {len(ours)} classes")
    if not count or not head or any(tensor.ndim == 0 or len(tensor) != count for tensor in head.values()):
        raise UserError(
            f"{where}.classes: {type(model).__name__} has no linear classifier here whose rows could be moved; leave it out"
        )
    order = torch.tensor(rows(teachers_order(chosen, ours, where), ours))
    for tensor in head.values():  # they share the parameters' memory
        tensor.copy_(tensor[order.to(tensor.device)])


def remedy(theirs: Sequence[str], ours: Sequence[str], where: str) -> str:
    """What to set for a teacher whose classes are known to be in this order."""
    if list(theirs) == natural(ours):
        return f"set {where}.classes=natural, the order of timm's train.py"
    if len(theirs) > SHORT:
        return f"set {where}.classes to the names in that order"
    as_yaml = ", ".join(json.dumps(name, ensure_ascii=False) for name in theirs)
    return f"set {where}.classes='[{as_yaml}]'"
