"""Checks the entries of COCO's `annotations`: objects with a label, a box and a mask. docs/how-to/transfer.md lists all
problems.

Entries that cannot be used are skipped and counted by kind of problem.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from scalekd.common.text import shortened

from .box_checks import CONTRADICTING, contradicts
from .masks import rle_counts

SHORTEST = 0.1  # pixels: a box is skipped if a side within its image is shorter
FARTHEST = 1e5  # pixels: largest coordinate of a polygon, because drawing takes memory in proportion to its sides
Problems = dict[str, list[str]]  # kind of problem: where it occurs


@dataclass(slots=True)
class Instance:
    label: int  # index in `Coco.classes` plus 1
    box: tuple[float, float, float, float]  # x, y, width, height in pixels, within the image
    mask: Any  # as in the file, checked: a list of polygons, or RLE; None if masks are not needed and there is none
    crowd: bool
    area: float | None  # in pixels, as in the file; None if missing there


@dataclass(slots=True)
class Picture:
    id: Hashable  # as in the file
    path: str
    height: int
    width: int
    instances: list[Instance] = field(default_factory=list)


def note(problems: Problems, kind: str, where: object) -> None:
    """Counts a problem of this kind."""
    problems.setdefault(kind, []).append(str(where))


def add_instances(
    entries: list[Any], pictures: dict[Hashable, Picture], labels: dict[int, int], problems: Problems, masks: bool
) -> None:
    """Adds the usable entries to the pictures, and the others to `problems`. labels: by category id. masks: whether an
    object needs one."""
    by_id: dict[Any, Any] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            note(problems, "annotations that are not JSON objects, skipped", shown(entry))
            continue
        where = f"annotation {shortened(str(entry.get('id')), 40)}"
        picture = pictures.get(entry.get("image_id")) if isinstance(entry.get("image_id"), (int, str)) else None
        if picture is None:
            note(problems, "annotations with an unknown image id, skipped", where)
            continue
        label = labels.get(entry["category_id"]) if is_whole(entry.get("category_id")) else None
        if label is None:
            valid = ", ".join(map(str, list(labels)[:5]))
            note(
                problems,
                f"annotations with an unknown category id (known: {valid}, ...), skipped",
                f"{where}: {shown(entry.get('category_id'))}",
            )
            continue
        if _is_repeated(entry, by_id, where, problems):
            continue
        if not picture.height:
            continue  # the picture is skipped and noted
        instance = _instance(entry, picture, label, where, problems, masks)
        if instance is not None:
            picture.instances.append(instance)


def _is_repeated(entry: dict[str, Any], by_id: dict[Any, Any], where: str, problems: Problems) -> bool:
    """Whether an identical annotation came before. Ids are not used otherwise, so two objects may share one."""
    id = entry.get("id")
    if not isinstance(id, (int, str)):
        return False
    before = by_id.setdefault(id, entry)
    if before is entry:
        return False
    if before == entry:
        note(problems, "duplicate annotations, counted once", where)
        return True
    note(problems, "annotation ids used for several objects, all kept", where)
    return False


def _instance(
    entry: dict[str, Any], picture: Picture, label: int, where: str, problems: Problems, masks: bool
) -> Instance | None:
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):
        note(problems, "annotations whose iscrowd is neither 0 nor 1, skipped", where)
        return None
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(v) for v in box):
        note(problems, "annotations without a box of four numbers, skipped", where)
        return None
    clipped, problem = _clipped(box, picture)
    if problem:
        note(problems, problem, where)
    if clipped is None:
        return None
    mask, problem = _usable_mask(entry.get("segmentation"), picture)
    if problem and masks:
        note(problems, problem, where)
    if mask is None and masks:
        return None
    if mask is not None and contradicts(clipped, mask, picture.height, picture.width):
        note(problems, CONTRADICTING, where)
        return None
    area: Any = entry.get("area")
    return Instance(label, clipped, mask, bool(crowd), float(area) if is_number(area) and area > 0 else None)


def _clipped(box: list[float], picture: Picture) -> tuple[tuple[float, float, float, float] | None, str]:
    """The part of x, y, width, height within the image, or None; and the problem, or ""."""
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return None, "boxes without area, skipped"
    left, top = max(x, 0.0), max(y, 0.0)
    right, bottom = min(x + width, picture.width), min(y + height, picture.height)
    if right <= left or bottom <= top:
        return None, "boxes entirely outside their image, skipped"
    if min(right - left, bottom - top) < SHORTEST:
        return None, f"boxes with a side below {SHORTEST} pixels within their image, skipped"
    outside = max(left - x, top - y, x + width - right, y + height - bottom)
    # up to one pixel is rounding, not a problem
    return (left, top, right - left, bottom - top), "boxes partly outside their image, clipped" if outside > 1 else ""


def _usable_mask(mask: Any, picture: Picture) -> tuple[Any, str]:
    """Polygons or RLE, or None; and the problem, or "". The box is no substitute: it would train wrong masks."""
    if isinstance(mask, list):
        good = [polygon for polygon in mask if _is_polygon(polygon)]
        if not good:
            return None, "annotations whose polygons are empty or malformed, skipped"
        return good, "annotations with some malformed polygons, the others kept" if len(good) < len(mask) else ""
    if isinstance(mask, dict):
        counts = rle_counts(mask.get("counts"))
        if counts is None or sum(counts) != picture.height * picture.width:
            return None, "annotations whose RLE does not cover their image exactly, skipped"
        if mask.get("size") != [picture.height, picture.width]:
            return None, "annotations whose RLE has another size than their image, skipped"
        if not any(counts[1::2]):
            return None, "annotations whose RLE is empty, skipped"
        return mask, ""
    return None, "annotations without a segmentation, skipped"


def _is_polygon(polygon: Any) -> bool:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return False
    return all(is_number(v) and abs(v) < FARTHEST for v in polygon)


# ---------------------------------------------------------------- values


def is_whole(value: Any) -> bool:
    """Whether it is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9  # nor NaN


def shown(value: Any) -> str:
    """A short form of any value, for messages."""
    return shortened(repr(value), 60)
