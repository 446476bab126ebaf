"""Collects what is wrong with a table, so that one error tells all of it with row numbers."""

from __future__ import annotations

from scalekd.common.errors import UserError
from scalekd.common.text import shortened

MOST = 10  # rows that are listed of each kind


class Problems:
    """Problems by kind, in the order in which kinds are first added."""

    def __init__(self, word: str = "row"):
        self.word = word  # what a number counts: `row`, or `image` in a JSON file
        self.found: dict[str, list[tuple[str, str]]] = {}

    def add(self, kind: str, number: int, detail: str = "", word: str = "") -> None:
        """Adds a row. kind: what is wrong, in the plural, such as `rows without a path`. word: what is numbered instead."""
        self.found.setdefault(kind, []).append((f"{word or self.word} {number}", detail))

    def raise_if_any(self, key: str, name: str) -> None:
        """Raises `UserError` with all problems of the table `name`, and the first rows of each kind."""
        if not self.found:
            return
        lines = [f"{key}: {shortened(name)} cannot be used; nothing was left out or changed"]
        for kind, rows in self.found.items():
            listed = [f"{row}{f' ({shortened(detail, 120)})' * bool(detail)}" for row, detail in rows[:MOST]]
            more = f" and {len(rows) - MOST} others" if len(rows) > MOST else ""
            lines.append(f"{kind} ({len(rows)}): {', '.join(listed)}{more}")
        raise UserError("\n  ".join(lines))
