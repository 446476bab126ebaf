"""A table on the screen that breaks no name: rows become short paragraphs where the columns do not fit."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

GAP = 2


def fitted(
    columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console, right: Collection[str] = ()
) -> RenderableType:
    """The table, or if it is wider than the screen, the first cell of each row with the other cells below it.

    A cell may have several lines. right: the columns to align right.
    """
    lines = [[column, *(line for row in rows for line in row[i].split("\n"))] for i, column in enumerate(columns)]
    if sum(max(map(len, column)) + GAP for column in lines) - GAP <= console.width:
        table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
        for column in columns:
            table.add_column(column, no_wrap=True, justify="right" if column in right else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        return table
    return Group(*(part for row in rows for part in _paragraph(columns, row)))


def _paragraph(columns: Sequence[str], row: Sequence[str]) -> list[RenderableType]:
    """A row's name, and below it `column: cell` for the others."""
    cells = [(column, " ".join(cell.split("\n"))) for column, cell in zip(columns[1:], row[1:]) if cell]
    text = "   ".join(f"{column}: {cell}" if column else cell for column, cell in cells)
    name = [Text(" ".join(row[0].split("\n")), "bold")] if row[0] else []
    return [*name, Padding(Text(text), (0, 0, 0, 2))]
