"""Prints the result of an analysis: a table and notes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console

from scalekd.common.tables import fitted


def print_table(
    console: Console, columns: Sequence[str], names: Iterable[str], rows: Iterable[Sequence[str]], notes: Sequence[str]
) -> None:
    """Prints rows and notes. The columns `names` hold names, which are aligned left; the others numbers."""
    table = fitted(columns, list(rows), console, [column for column in columns if column not in names])
    console.print(table, markup=False, highlight=False)
    console.print("", *notes, sep="\n", markup=False, highlight=False, soft_wrap=True)


def closing_notes(found: dict[str, Any]) -> list[str]:
    """Which runs are not finished, and which images were used. found: results of an analysis of runs."""
    unfinished = [
        f"{run['run']} is not finished: step {run['step']} of {run['of_steps']}."
        for run in found["runs"]
        if run["step"] < run["of_steps"]
    ]
    return [*unfinished, f"{found['images']} of {found['of_images']} images of {found['data']}."]
