"""Formats text for messages and screens: escapes, counts, durations, tick labels."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def printable(text: str) -> str:
    """`text` on one line, with unprintable characters escaped, as in \\x1b or \\n.

    Apply it to names of files and classes, which may contain anything.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def in_shell(path: object) -> str:
    """A path or a name, quoted for a command that a message prints for copying."""
    return shlex.quote(str(path))


def shortened(text: str, most: int = 400) -> str:
    """`text` on one line, cut to `most` characters (before escapes); for text that came from a file."""
    return printable(text if len(text) <= most else f"{text[:most]} ...")


def counted(number: float, what: str) -> str:
    """`1 epoch`, `2 epochs`."""
    return f"{number} {what}{'s' * (number != 1)}"


def say(console: Console, text: str) -> None:
    """Prints `text` as it is, without rich's markup, highlighting or line breaks."""
    console.print(printable(text), highlight=False, markup=False, emoji=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """`41 s` for 41, `1 h 01 min` for 3700."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def tick_text(value: float) -> str:
    """A short label of an axis tick: `2.5k` for 2500."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if size <= abs(value) < size * 1e4:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
