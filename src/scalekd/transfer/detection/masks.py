"""Decodes masks in COCO's two formats, polygons and run lengths (RLE), to pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalekd.common.errors import UserError
from scalekd.transfer.tasks import TASKS


def rle_counts(counts: Any) -> list[int] | None:
    """Lengths of the runs of 0, 1, 0, ... down the columns, from a list or COCO's text form; None if it is invalid.

    The text is decoded and checked here because the C code of COCO's tools does not check where it ends. Each
    character, counted from "0", has six bits: five bits of the number, lowest first, and a continuation bit. From the
    fourth run on, the number is the difference to the run two before (cocoapi, maskApi.c, rleFrString).
    """
    if isinstance(counts, list):
        return counts if all(type(n) is int and n >= 0 for n in counts) else None
    if not isinstance(counts, str) or not all("0" <= c <= "o" for c in counts):
        return None
    runs: list[int] = []
    value = shift = 0
    for bits in (ord(c) - 48 for c in counts):
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # negative
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs if shift == 0 and min(runs, default=-1) >= 0 else None


def mask_of(mask: Any, height: int, width: int) -> NDArray[np.uint8]:
    """Polygons or RLE, checked by `open_coco`, to `(height, width)` of 0 and 1.

    Polygons use COCO's rasteriser. Raises `UserError` if the extra is missing.
    """
    if isinstance(mask, dict):
        counts = rle_counts(mask["counts"])
        assert counts is not None  # checked by `open_coco`
        values = np.arange(len(counts), dtype=np.uint8) % 2
        return np.repeat(values, counts).reshape(width, height).T
    rle = mask_tools()
    return rle.decode(rle.merge(rle.frPyObjects(mask, height, width)))


def mask_tools() -> Any:
    """The RLE functions of faster-coco-eval. Raises `UserError` if the extra is missing."""
    try:
        from faster_coco_eval.core import mask as tools
    except ImportError:
        raise UserError(TASKS["detection"].missing) from None
    return tools
