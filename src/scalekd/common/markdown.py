"""Markdown that shows names from outside as they are."""

from __future__ import annotations

from collections.abc import Iterable

from .text import printable


def escaped(text: str) -> str:
    """On one line, and no end of a table's cell."""
    return printable(text).replace("|", "\\|")


def table_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(escaped, cells))} |"
