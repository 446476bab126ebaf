"""A plain description of the data of a run: what the commands print before they start, and keep in their results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scalekd.common.text import counted, printable, shortened

from .sources.names import LeftOut

FIRST = 5  # classes that are listed by name


def part(images: int, source: str, chosen: str = "", left_out: LeftOut | None = None) -> dict[str, Any]:
    """One part of the data: number of images, where they are from, how they were chosen, what was left out by reason."""
    return {"images": images, "from": source, "chosen": chosen, "left_out": dict(left_out or {})}


def classes_of(names: Sequence[str], targets: Iterable[int]) -> dict[str, Any]:
    """Number of classes, the first names, and the smallest and largest class by images.

    targets: the class of every image; images without a class have a negative one.
    """
    images = Counter(target for target in targets if target >= 0)
    sizes = [(images[i], name) for i, name in enumerate(names)]
    extremes = {}
    if sizes:
        extremes = {
            "smallest": dict(zip(("images", "name"), min(sizes, key=lambda s: s[0]))),
            "largest": dict(zip(("images", "name"), max(sizes, key=lambda s: s[0]))),
        }
    return {"count": len(names), "first": list(names[:FIRST]), **extremes}


def lines_of(described: Mapping[str, Any]) -> list[str]:
    """The description as lines of text."""
    lines = []
    for name in ("training", "unlabelled", "validation"):
        if one := described.get(name):
            chosen = f" ({one['chosen']})" if one["chosen"] else ""
            lines.append(f"{name}: {counted(one['images'], 'image')} from {shortened(one['from'])}{chosen}")
    if classes := described.get("classes"):
        lines.append(_classes_line(classes))
    for name in ("training", "unlabelled", "validation"):
        for reason, entry in described.get(name, {}).get("left_out", {}).items():
            lines.append(f"left out of {name}: {entry['count']} {reason}, such as {shortened(entry['example'], 100)}")
    return [printable(line) for line in [*lines, *described.get("notes", [])]]


def _classes_line(classes: Mapping[str, Any]) -> str:
    names = ", ".join(classes["first"]) + ", ..." * (classes["count"] > len(classes["first"]))
    text = f"{counted(classes['count'], 'class').replace('classs', 'classes')}: {shortened(names, 200)}"
    if smallest := classes.get("smallest"):
        largest = classes["largest"]
        text += f"; smallest {shortened(smallest['name'], 40)} ({smallest['images']}), largest "
        text += f"{shortened(largest['name'], 40)} ({largest['images']})"
    return text
