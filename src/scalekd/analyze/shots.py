"""Which labelled images a probe fits to: a number of each class, drawn several times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from scalekd.common.errors import UserError
from scalekd.common.text import counted, printable
from scalekd.data.split import Split, by_class
from scalekd.data.targets import Target, classes_in, count_of

from .probe_page import ALL, Shots

Set = tuple[Shots, int]  # a set of labelled images: (images per class, index of the draw)
NAMED = 3  # classes listed in a message, at most


def parse_shots(text: str) -> list[Shots]:
    """'5,1,all' -> [1, 5, "all"], sorted. Raises `UserError`."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    wrong = [word for word in words if word != ALL and not (word.isdecimal() and 0 < int(word) < 2**31)]
    if wrong or not words:
        problem = f"'{wrong[0]}' is neither a positive number nor 'all'" if wrong else "empty"
        raise UserError(f"`shots`: {problem}; use for example 1,5,10,25,all")
    counts: list[Shots] = sorted({int(word) for word in words if word != ALL})
    return counts + [ALL] * (ALL in words)


def labelled_sets(split: Split, shots: Sequence[Shots], draws: int, seed: int) -> dict[Set, list[int]]:
    """The images of every set as sorted indices of the training source. `all` has one draw.

    Draw d is an order of all training images, seeded with `seed` + d. n shots are the first n images of each class in
    it, so the images of 1 shot are among those of 5. An image with several classes that is among the first n of one of
    them brings all its labels, so frequent classes have more than n. Raises `UserError` if a class has fewer images than
    shots.
    """
    targets = [split.train.targets[i] for i in split.train_indices]
    counted_by = count_of(targets)
    counts = [counted_by[c] for c in range(len(split.classes))]
    most = max([1, *(n for n in shots if isinstance(n, int))])
    if few := [f"{name} ({n})" for name, n in zip(split.classes, counts) if n < most]:
        names = ", ".join(few[:NAMED]) + ", ..." * (len(few) > NAMED)
        remedy = f"set `shots` to {min(counts)} at most, or all" if min(counts) else "add labelled images"
        raise UserError(
            f"`data`: {len(few)} of {len(counts)} classes have fewer than {counted(most, 'training image')}: "
            f"{printable(names)}; {remedy}"
        )
    orders = [by_class(targets, seed + d) for d in range(draws)]
    sets: dict[Set, list[int]] = {}
    for n in shots:
        for d in range(1 if n == ALL else draws):
            chosen = range(len(targets)) if n == ALL else first_of_each(orders[d], targets, int(n))
            sets[n, d] = sorted(split.train_indices[i] for i in chosen)
    return sets


def first_of_each(order: Sequence[int], targets: Sequence[Target], n: int) -> list[int]:
    """The indices in `order` that are among the first n of one of their classes."""
    seen: Counter[int] = Counter()
    chosen = []
    for i in order:
        classes = classes_in(targets[i])
        if any(seen[c] < n for c in classes):
            chosen.append(i)
        seen.update(classes)
    return chosen
