"""Size and latency of a student, its int8 files and its teachers, as `scalekd quantize` measured them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .card import marked
from .folder import read_json
from .page import NONE, section, table
from .svg import escape, finite

FILE = "quantize.json"
COLUMNS = ["", "top-1 %", "change from float32", "same class %", "MB", "ms, 1 image", "ms, 16 images"]
OF_SETS = ["", "mAP %", "change from float32", "same labels %", *COLUMNS[4:]]


def columns(folder: Path) -> list[str]:
    """The head of the table: with mAP for a student of sets of labels."""
    rows = _mappings(read_json(folder / FILE).get("rows"))
    return OF_SETS if any("map" in row for _, row in rows) else COLUMNS


def quantized_rows(folder: Path) -> list[list[str]]:
    """The rows of a table under `columns`; none if nothing was measured. Damaged values are left out."""
    values = read_json(folder / FILE)
    rows = [_row(str(row.get("label", name)), row) for name, row in _mappings(values.get("rows"))]
    teachers = [_row(f"{key}, {of.get('model', '')}, float32", of) for key, of in _mappings(values.get("teachers"))]
    return [row for row in rows + teachers if any(cell != NONE for cell in row[1:])]


def quantized_section(folder: Path) -> str:
    """The section of the report; '' if nothing was measured."""
    rows = quantized_rows(folder)
    return section("Size and speed", table(columns(folder), rows, "numbers"), escape(note(folder))) if rows else ""


def quantized_block(folder: Path) -> str:
    """The table of a model card, in Markdown; '' if nothing was measured."""
    rows = quantized_rows(folder)
    if not rows:
        return ""
    head = columns(folder)
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    lines += ["| " + " | ".join(marked(cell) for cell in row) + " |" for row in rows]
    return "\n".join([*lines, "", marked(note(folder))])


def note(folder: Path) -> str:
    """How the numbers were measured, and what the int8 files have in float32."""
    values = read_json(folder / FILE)
    told = [f"Measured by `scalekd quantize` on {values.get('machine', 'a machine that it does not name')}"]
    if isinstance(values.get("latency_of"), str):
        told.append(f"latency: {values['latency_of']}")
    left = values.get("left_in_float")
    kinds = [kind for kind in left if isinstance(kind, dict)] if isinstance(left, list) else []
    if named := [text for kind in kinds if (text := _operator(kind))]:
        told.append(f"in float32 in the int8 files: {', '.join(named)}")
    return "; ".join(told) + "."


def _operator(kind: Mapping[str, Any]) -> str:
    name, count, share = kind.get("operator"), kind.get("count"), kind.get("share")
    if not isinstance(name, str) or not finite(count):
        return ""
    return f"{name} x {count:.0f}" + (f" ({share:.1%} of the multiply-adds)" if finite(share) and share else "")


def _row(label: str, row: Mapping[str, Any]) -> list[str]:
    change, spread, size = row.get("change"), row.get("change_interval"), row.get("bytes")
    times = [_median(row.get("latency_ms"), images) for images in ("1", "16")]
    return [
        label,
        _number(row.get("map", row.get("top1")), ".2f"),
        f"{change:+.2f} ± {spread:.2f}" if finite(change) and finite(spread) else NONE,
        _number(row.get("agreement"), ".2f"),
        _number(size / 1e6 if finite(size) else None, ".2f"),
        *times,
    ]


def _median(latency: Any, size: str) -> str:
    values = latency.get(size) if isinstance(latency, dict) else None
    return _number(values.get("median"), ".2f") if isinstance(values, dict) else NONE


def _number(value: Any, form: str) -> str:
    return f"{value:{form}}" if finite(value) else NONE


def _mappings(values: Any) -> Sequence[tuple[str, dict[str, Any]]]:
    items = values.items() if isinstance(values, dict) else ()
    return [(str(name), row) for name, row in items if isinstance(row, dict)]
