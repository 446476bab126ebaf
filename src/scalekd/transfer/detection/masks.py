"""Masks in COCO's two notations, polygons and runs (RLE), to pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalekd.common.errors import UserError
from scalekd.transfer.tasks import TASKS


def rle_counts(counts: Any) -> list[int] | None:
    """Lengths of the runs of 0, 1, 0, ... down the columns, from a list or COCO's text; None if it is neither.

    Done here, and checked: the C code behind COCO's tools reads such text without looking where it ends. Six bits a
    character from "0" on: five of the number, lowest first, and whether it goes on; from the third run on, the
    difference to the run two before (cocoapi's maskApi.c).
    """
    if isinstance(counts, list):
        return counts if all(type(n) is int and n >= 0 for n in counts) else None
    if not isinstance(counts, str) or not all("0" <= c <= "o" for c in counts):
        return None
    found: list[int] = []
    value = shift = 0
    for bits in (ord(c) - 48 for c in counts):
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # negative
            value -= 1 << shift
        found.append(value + (found[-2] if len(found) > 2 else 0))
        value = shift = 0
    return found if shift == 0 and min(found, default=-1) >= 0 else None


def mask_of(mask: Any, height: int, width: int) -> NDArray[np.uint8]:
    """Polygons or RLE, checked by `open_coco`, to `(height, width)` of 0 and 1.

    Polygons by COCO's own rasteriser. Raises `UserError` without the extra.
    """
    if isinstance(mask, dict):
        counts = rle_counts(mask["counts"])
        assert counts is not None  # looked at when it was opened
        values = np.arange(len(counts), dtype=np.uint8) % 2
        return np.repeat(values, counts).reshape(width, height).T
    rle = mask_tools()
    return rle.decode(rle.merge(rle.frPyObjects(mask, height, width)))


def mask_tools() -> Any:
    """faster-coco-eval's functions for RLE. Raises `UserError` without the extra."""
    try:
        from faster_coco_eval.core import mask as tools
    except ImportError:
        raise UserError(TASKS["detection"].missing) from None
    return tools
