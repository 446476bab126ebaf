"""Shared by the figures of the analyses: matplotlib, colours, and files as SVG, PNG and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scalekd.common.errors import UserError
from scalekd.common.files import replacing, write_text
from scalekd.common.text import printable

FIGURES_MISSING = "figures need matplotlib: pip install 'scalekd[figures]'. Without `out` only the table is printed"

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
MARKERS = "osD^vX*P"


def figure_class() -> Any:
    """matplotlib's class Figure and its module colors. Raises `UserError` without the extra `figures`."""
    try:
        import matplotlib
        from matplotlib import colors
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(FIGURES_MISSING) from None
    matplotlib.rcParams["svg.hashsalt"] = "scalekd"  # otherwise the ids in an SVG file are random
    return Figure, colors


def write_figure(figure: Any, folder: Path, name: str) -> None:
    """Writes `folder`/NAME.svg and .png. Raises `UserError`."""
    for form in ("svg", "png"):
        image = io.BytesIO()
        metadata = {"Date": None} if form == "svg" else None  # so that equal data give an equal file
        figure.savefig(image, format=form, dpi=150, metadata=metadata)
        with replacing(folder / f"{name}.{form}") as file:
            file.write(image.getvalue())


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Raises `UserError`."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_plain(cell) for cell in row] for row in rows)
    write_text(path, lines.getvalue())


def _plain(cell: Any) -> Any:
    """Text on one line, which a spreadsheet does not take for a formula."""
    if not isinstance(cell, str):
        return cell
    return f"'{printable(cell)}" if cell.startswith(("=", "+", "-", "@")) else printable(cell)


def short(label: str) -> str:
    """`label` in at most 34 characters, without its middle."""
    return label if len(label) <= 34 else f"{label[:16]}...{label[-15:]}"
