"""Text for people: one line, counts, durations, printing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def printable(text: str) -> str:
    """On one line, whatever a file or class is called: control characters and the like as \\x1b or \\n."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shortened(text: str, most: int = 400) -> str:
    """On one line and not longer than that, for what came from a file."""
    return printable(text if len(text) <= most else f"{text[:most]} ...")


def counted(number: float, what: str) -> str:
    """1 epoch, 2 epochs."""
    return f"{number} {what}{'s' * (number != 1)}"


def say(console: Console, text: str) -> None:
    console.print(printable(text), highlight=False, markup=False, emoji=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """41 -> '41 s', 3700 -> '1 h 02 min'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def tick_text(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if size <= abs(value) < size * 1e4:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
