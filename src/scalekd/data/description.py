"""A plain description of the data of a run: what the commands print before they start, and keep in their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from scalekd.common import parallel
from scalekd.common.text import counted, say, shortened

from .images import BadImages
from .sources.names import LeftOut
from .sources.source import Source
from .targets import Target, are_sets, count_of

KEY = "data_description"  # its key in summary.json and other results
FIRST = 5  # classes that are listed by name


def part(images: int, source: str, chosen: str = "", left_out: LeftOut | None = None) -> dict[str, Any]:
    """One part of the data: number of images, where they are from, how they were chosen, what was left out by reason."""
    return {"images": images, "from": source, "chosen": chosen, "left_out": dict(left_out or {})}


def classes_of(names: Sequence[str], targets: Sequence[Target], what: str = "images") -> dict[str, Any]:
    """Number of classes, the first names, and the smallest and largest class by images.

    targets: the class or the set of classes of every image; images without a class have a negative one. what: what is
    counted.
    """
    images = count_of(targets)
    described: dict[str, Any] = {"count": len(names), "first": list(names[:FIRST])}
    for key, choose in (("smallest", min), ("largest", max)):
        if names:
            i = choose(range(len(names)), key=lambda i: images[i])
            described[key] = {"name": names[i], what: images[i]}
    if are_sets(targets):
        described["labels_per_image"] = round(images.total() / len(targets), 2)
    return described


def of_source(source: Source, text: str) -> dict[str, Any]:
    """The description of images that a model is evaluated on."""
    validation = part(len(source), text, "", source.left_out)
    return {"validation": validation, "classes": classes_of(source.classes, source.targets), "notes": []}


def tell_data(console: Console, described: Mapping[str, Any]) -> None:
    """Prints the description, in the first process only."""
    if parallel.rank() == 0:
        for line in lines_of(described):
            say(console, line)


def with_bad(described: Mapping[str, Any], **bad: BadImages | None) -> dict[str, Any]:
    """The description with the images that could not be read; `training` and `validation` have a record of them."""
    result = dict(described)
    for name, found in bad.items():
        if found is not None and found.found and name in result:
            first, reason = next(iter(found.found.items()))
            entry = {"count": len(found.found), "example": f"{first}: {reason}"}
            result[name] = result[name] | {"left_out": result[name]["left_out"] | {"bad images": entry}}
    return result


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
    return [*lines, *described.get("notes", [])]


def _classes_line(classes: Mapping[str, Any]) -> str:
    names = ", ".join(classes["first"]) + ", ..." * (classes["count"] > len(classes["first"]))
    text = f"{counted(classes['count'], 'class').replace('classs', 'classes')}: {shortened(names, 200)}"
    if smallest := classes.get("smallest"):
        sizes = [_number_of(c) for c in (smallest, classes["largest"])]
        names = [shortened(c["name"], 40) for c in (smallest, classes["largest"])]
        if sizes[0] == sizes[1]:
            text += f"; {sizes[0]} each"
        else:
            text += f"; smallest {names[0]} ({sizes[0]}), largest {names[1]} ({sizes[1]})"
    if (labels := classes.get("labels_per_image")) is not None:
        text += f"; several labels per image, {labels:g} on average"
    return text


def _number_of(extreme: Mapping[str, Any]) -> str:
    return ", ".join(f"{value} {what}" for what, value in extreme.items() if what != "name")
