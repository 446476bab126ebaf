"""Markdown that is safe for any class, file or model name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .text import printable


def escaped(text: object) -> str:
    """`text` on one line, so that Markdown shows it as it is, also at the start of a line."""
    # a heading, a quote or a list
    return re.sub(r"^(\s*)([#>+=-])|^(\s*\d+)([.)])(?!\S)", r"\1\3\\\2\4", _inline(text))


def _inline(text: object) -> str:
    """`text` as no link, image, HTML or end of a table cell. Underscores inside words are not emphasis and stay."""
    return re.sub(r"[\\`*\[\]|&~$]|<(?=[^\s\d])|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", printable(str(text)))


def code(text: object) -> str:
    """`text` as a code span on one line, fenced by more backticks than it has in a row."""
    plain = printable(str(text))
    fence = "`" * (1 + max(map(len, re.findall("`+", plain)), default=0))
    return f"{fence} {plain} {fence}" if "`" in plain else f"`{plain}`"


def table_row(cells: Iterable[str]) -> str:
    """One row of a table; the cells are escaped."""
    return f"| {' | '.join(map(_inline, cells))} |"
