"""Markdown tables that are safe for any class, file or model name."""

from __future__ import annotations

from collections.abc import Iterable

from .text import printable


def escaped(text: str) -> str:
    """`text` on one line, with `|` escaped, so that it stays inside a table cell."""
    return printable(text).replace("|", "\\|")


def table_row(cells: Iterable[str]) -> str:
    """One row of a table; the cells are escaped."""
    return f"| {' | '.join(map(escaped, cells))} |"
