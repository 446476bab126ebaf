"""What the analyses' figures share: matplotlib, colours that survive greyscale, SVG and PNG, and the data as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scalekd.common.errors import UserError
from scalekd.common.files import replacing, write_text

FIGURES_MISSING = "the figure needs matplotlib: pip install 'scalekd[figures]'; without --out the table is shown alone"

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
MARKERS = "osD^vX*P"


def figure_class() -> Any:
    """matplotlib's figure and its colours. Raises `UserError` without the extra."""
    try:
        import matplotlib
        from matplotlib import colors
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(FIGURES_MISSING) from None
    matplotlib.rcParams["svg.hashsalt"] = "scalekd"  # else every figure has other ids
    return Figure, colors


def write_figure(figure: Any, folder: Path, name: str) -> None:
    """`folder`/name.svg and .png. Raises `UserError`."""
    for form in ("svg", "png"):
        drawn = io.BytesIO()
        metadata = {"Date": None} if form == "svg" else None  # the same data, the same file
        figure.savefig(drawn, format=form, dpi=150, metadata=metadata)
        with replacing(folder / f"{name}.{form}") as file:
            file.write(drawn.getvalue())


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Raises `UserError`."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, lines.getvalue())


def short(label: str) -> str:
    """At most 34 characters, the middle left out."""
    return label if len(label) <= 34 else f"{label[:16]}...{label[-15:]}"
