"""Finds COCO boxes that contradict the masks of the same objects: corners for sizes, fractions for pixels."""

from __future__ import annotations

from typing import Any

import numpy as np

from scalekd.common.errors import UserError
from scalekd.common.text import counted, shortened

from .masks import rle_counts

CONTRADICTING = "boxes that contradict their mask, skipped"
OVERLAP = 0.5  # smallest intersection over union of a box and the box around its mask
NEAR = 2.0  # pixels: boxes whose sides are at most that far apart do not contradict each other
ALLOWED = 0.05  # share of the annotations that may be dropped one by one
FEW = 10  # annotations that may be dropped in a small file, if they are not half of it

Box = tuple[float, float, float, float]  # x, y, width, height in pixels


def contradicts(box: Box, mask: Any, height: int, width: int) -> bool:
    """Whether a box is somewhere else than its mask. box: within the image. mask: polygons or RLE, checked."""
    left, top, right, bottom = _around(mask, height, width)
    x, y, w, h = box
    if max(abs(left - x), abs(top - y), abs(right - x - w), abs(bottom - y - h)) <= NEAR:
        return False
    shared = max(0.0, min(right, x + w) - max(left, x)) * max(0.0, min(bottom, y + h) - max(top, y))
    return shared < OVERLAP * (w * h + (right - left) * (bottom - top) - shared)


def _around(mask: Any, height: int, width: int) -> Box:
    """Left, top, right and bottom of a mask within the image."""
    if isinstance(mask, list):
        xs, ys = ([v for polygon in mask for v in polygon[k::2]] for k in (0, 1))
        return max(0.0, min(xs)), max(0.0, min(ys)), min(float(width), max(xs)), min(float(height), max(ys))
    counts = np.array(rle_counts(mask["counts"]), dtype=np.int64)
    ends = np.cumsum(counts)
    ones = counts[1::2] > 0
    first, last = (ends - counts)[1::2][ones], ends[1::2][ones] - 1  # pixels of each run of the mask, down the columns
    columns, rows = (first // height, last // height), (first % height, last % height)
    whole = bool((columns[0] < columns[1]).any())  # a run over the end of a column covers its last and first rows
    top, bottom = (0, height - 1) if whole else (rows[0].min(), rows[1].max())
    return float(columns[0].min()), float(top), float(columns[1].max() + 1), float(bottom + 1)


def _boxes(entries: list[Any]) -> list[list[float]]:
    boxes = (entry.get("bbox") for entry in entries if isinstance(entry, dict))
    return [b for b in boxes if isinstance(b, list) and len(b) == 4 and all(type(v) in (int, float) for v in b)]


def refuse_fractions(entries: list[Any], where: str) -> None:
    """Raises `UserError` if no box reaches beyond one pixel: its numbers are fractions of the image."""
    boxes = [box for box in _boxes(entries) if box[2] > 0 and box[3] > 0]
    if boxes and all(0 <= v <= 1 for box in boxes for v in box):
        raise UserError(
            f"{where}: all boxes lie within one pixel, such as {boxes[0]}: they are fractions of the image. "
            "Write x, y, width, height in pixels"
        )


def refuse_many_contradictions(entries: list[Any], contradicting: int, where: str) -> None:
    """Raises `UserError` if more than a few boxes contradict their masks."""
    if not _too_many(contradicting, len(entries)):
        return
    boxes = _boxes(entries)
    corners = bool(boxes) and all(box[2] > box[0] and box[3] > box[1] for box in boxes)
    meant = (
        "Boxes seem to be x1, y1, x2, y2; COCO's are x, y, width, height" if corners else "Use boxes around the masks"
    )
    raise UserError(
        f"{where}: {counted(contradicting, 'box')} of {len(entries)} annotations contradict the masks of the same objects. "
        f"{meant}, in pixels".replace("boxs", "boxes")
    )


def refuse_many_dropped(entries: int, problems: dict[str, list[str]], where: str) -> None:
    """Raises `UserError` if more than a few annotations cannot be used; `problems` by kind."""
    dropped = {kind: at for kind, at in problems.items() if kind.endswith("skipped") and not kind.startswith("image")}
    count = sum(map(len, dropped.values()))
    if _too_many(count, entries):
        kinds = "".join(
            f"\n{shortened(kind, 100)}: {len(at)} ({shortened(at[0], 60)})" for kind, at in list(dropped.items())[:5]
        )
        raise UserError(f"{where}: {count} of {entries} annotations cannot be used; repair the file.{kinds}")


def _too_many(count: int, entries: int) -> bool:
    return count > ALLOWED * entries and (count > FEW or 2 * count > entries)
