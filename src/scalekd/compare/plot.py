"""Plots of a comparison as SVG: the gain of every method over the baseline, and accuracy over samples seen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from scalekd.report.series import thin
from scalekd.report.svg import (
    HEIGHT,
    INK,
    LEFT,
    RIGHT,
    WIDTH,
    Axis,
    Curve,
    chart_parts,
    curve_key,
    finite,
    nice_ticks,
    percent_axis,
    svg_file,
    text_at,
    x_axis,
)

from .figure import figure_in

Cell = dict[str, Any]  # one method on one student: summary["students"][student][method]

ROW = 30  # height of a method's row in the gain plot
LONGEST = 18  # characters of a method's name next to its row
BEST = 4  # methods in a plot of curves, in addition to the baseline


@dataclass
class Panel:
    """One student's plot, WIDTH x height pixels, and its legend as (drawing of 44 x 14 pixels, text)."""

    title: str
    parts: list[str]
    height: float
    keys: list[tuple[str, str]] = field(default_factory=list)


def gain_plot(summary: dict[str, Any]) -> str:
    """An SVG file with the gains and their intervals, one panel per student below each other."""
    return _file([*gain_panels(summary), Panel("", [], 0, GAIN_KEYS)], gain_label(summary), key_columns=1)


def curve_plot(summary: dict[str, Any]) -> str | None:
    """An SVG file with the figure over samples seen, of the baseline and the best methods. None without curves."""
    panels = curve_panels(summary)
    return _file(panels, f"{summary['metric']} over samples seen", key_columns=2) if panels else None


def gain_label(summary: dict[str, Any]) -> str:
    return f"gain over {summary['baseline']} (points)"


def is_significant(cell: Cell) -> bool:
    """Whether p < 0.05 in the paired t-test against the baseline, after Holm's correction."""
    return finite(cell.get("p_holm")) and cell["p_holm"] < 0.05


def by_seed(cell: Cell) -> dict[int, float]:
    return {seed: figure for seed, figure in zip(cell["seeds"], figures_in(cell)) if finite(figure)}


def figures_in(cell: Cell) -> list[float]:
    """Top-1, or mAP with sets of labels, of every finished seed; [] for an empty cell."""
    return list(cell[figure_in(cell)]) if cell else []


# ---------------------------------------------------------------- gains


@dataclass
class _Row:
    label: str
    cell: Cell
    seeds: list[float]  # the gain of every seed that has a baseline run too

    @property
    def gain(self) -> float | None:
        return self.cell.get("gain") if finite(self.cell.get("gain")) else None

    @property
    def half(self) -> float:
        return self.cell["gain_ci95"] if finite(self.cell.get("gain_ci95")) else 0.0


def gain_panels(summary: dict[str, Any]) -> list[Panel]:
    """One panel per student, all with the same axis so that students can be compared."""
    students = {name: _rows(methods, summary["baseline"]) for name, methods in summary["students"].items()}
    rows = [row for rows in students.values() for row in rows]
    start = 14 + 8.3 * max((min(len(row.label), LONGEST) for row in rows), default=0)
    axis = Axis(_gain_ticks([row for row in rows if row.gain is not None]), start, WIDTH - 16)
    return [_gain_panel(name, rows, axis, gain_label(summary)) for name, rows in students.items()]


def _rows(methods: dict[str, Cell], baseline: str) -> list[_Row]:
    reference = by_seed(methods[baseline]) if baseline in methods else {}
    rows = []
    for name, cell in methods.items():
        if name != baseline:
            gains = [figure - reference[seed] for seed, figure in by_seed(cell).items() if seed in reference]
            rows.append(_Row(name, cell, gains))
    return rows


def _gain_ticks(rows: Sequence[_Row]) -> list[float]:
    """Ticks that cover zero, every mean, every seed and, while these stay readable, the intervals.

    One method that failed would squeeze all others: losses of more than three times the largest gain (or the median
    absolute mean, if that is larger) may lie outside. So may the ends of wide intervals, which are six times as wide
    with two seeds as with five.
    """
    gains = [row.gain for row in rows if row.gain is not None]
    points = [0.0, *gains, *(gain for row in rows for gain in row.seeds)]
    floor = -3 * max([max(points), statistics.median(map(abs, gains))]) if gains else 0.0
    points = [point for point in points if point >= floor]
    low, high = min(points), max(points)
    room = (high - low) / 2
    kept = [(row.gain, row.half) for row in rows if row.gain is not None and row.gain >= floor]
    return nice_ticks(
        max(low - room, min([low, *(gain - half for gain, half in kept)])),
        min(high + room, max([high, *(gain + half for gain, half in kept)])),
    )


def _gain_panel(title: str, rows: Sequence[_Row], axis: Axis, label: str) -> Panel:
    bottom = ROW * len(rows) + 8
    parts = x_axis(axis, 0, bottom, label)
    parts.append(f'<path class="zero" d="M{axis.at(0):.1f} 0V{bottom}"/>')
    for i, row in enumerate(rows):
        y = ROW * i + 4 + ROW / 2
        parts += [text_at(axis.start - 8, y + 5, _short(row.label, LONGEST), "end"), *_gain_marks(row, y, axis)]
    return Panel(title, parts, bottom + 48)


def _gain_marks(row: _Row, y: float, axis: Axis) -> list[str]:
    low, high = axis.ticks[0], axis.ticks[-1]
    if row.gain is None:
        why = "no seed in common with the baseline" if by_seed(row.cell) else "no finished run"
        zero = axis.at(0)
        left = zero + 8 if zero < (axis.start + axis.end) / 2 else axis.start + 6  # the side with more room
        return [text_at(left, y + 5, why)]
    ends = (row.gain - row.half, row.gain + row.half)
    parts = [f'<path class="seed" d="M{axis.at(gain):.1f} {y + 6:g}v7"/>' for gain in row.seeds if low <= gain <= high]
    if min(*ends, *row.seeds) < low:
        parts.append(f'<path class="mark ink" d="M{axis.start - 2:.1f} {y:g}l7-5v10z"/>')
    if max(*ends, *row.seeds) > high:
        parts.append(f'<path class="mark ink" d="M{axis.end + 2:.1f} {y:g}l-7-5v10z"/>')
    if row.gain < low:
        return [*parts, text_at(axis.start + 12, y + 5, f"{row.gain:+.2f}")]
    if row.half:
        left, right = (axis.at(min(max(end, low), high)) for end in ends)
        parts.append(f'<path class="range" d="M{left:.1f} {y:g}H{right:.1f}"/>')
        parts += [f'<path class="range" d="M{axis.at(e):.1f} {y - 4:g}v8"/>' for e in ends if low <= e <= high]
    shape = SIGNIFICANT if is_significant(row.cell) else NOT_SIGNIFICANT
    return [*parts, f'<g transform="translate({axis.at(row.gain):.1f} {y:g})">{shape}</g>']


# shape and fill differ, so that no colour is needed
SIGNIFICANT = '<path class="mark s0" d="M0-7l7 7l-7 7l-7-7z"/>'
NOT_SIGNIFICANT = '<path class="hollow" d="M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z"/>'

GAIN_KEYS = [
    (f'<g transform="translate(22 7)">{SIGNIFICANT}</g>', "mean gain, p < 0.05 (Holm)"),
    (f'<g transform="translate(22 7)">{NOT_SIGNIFICANT}</g>', "mean gain, p ≥ 0.05 or not tested"),
    ('<path class="range" d="M4 7H40M4 3v8M40 3v8"/>', "95 % interval of the mean gain"),
    ('<path class="seed" d="M12 3v7M22 3v7M29 3v7"/>', "one seed each"),
    ('<path class="mark ink" d="M18 7l7-5v10z"/>', "continues beyond the axis"),
]


# ---------------------------------------------------------------- curves


def curve_panels(summary: dict[str, Any]) -> list[Panel]:
    """One panel per student that has curves, with the same methods and line styles in all of them."""
    styles = {summary["baseline"]: INK} | {name: i for i, name in enumerate(_best(summary))}
    panels = []
    for student, methods in summary["students"].items():
        points = {name: _points(cell) for name, cell in methods.items() if name in styles}
        curves = [Curve(thin(some, 200), name, styles[name]) for name, some in points.items() if some]
        if curves:
            x = Axis(nice_ticks(0, max(x for c in curves for x, _ in c.points)), LEFT, RIGHT)
            y, _ = percent_axis(curves, 0.5)
            parts = chart_parts(curves, x, y, "samples seen", summary["metric"])
            panels.append(Panel(student, parts, HEIGHT, [(curve_key(c), c.label) for c in curves]))
    return panels


def _best(summary: dict[str, Any]) -> list[str]:
    """The methods with the largest gains, averaged over the students, in the ladder's order."""
    gains: dict[str, list[float]] = {}
    for methods in summary["students"].values():
        for name, cell in methods.items():
            if name != summary["baseline"] and _points(cell):
                gains.setdefault(name, []).extend([cell["gain"]] if finite(cell.get("gain")) else [])
    means = {name: statistics.fmean(some) if some else -math.inf for name, some in gains.items()}
    best = sorted(means, key=lambda name: -means[name])[:BEST]
    return [name for name in means if name in best]


def _points(cell: Cell) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in cell.get("curve") or [] if finite(x) and finite(y)]


# ---------------------------------------------------------------- files


def _file(panels: Sequence[Panel], label: str, key_columns: int) -> str:
    """An SVG file of panels with titles and legends below each other, with its own style and background."""
    parts: list[str] = []
    top = 12.0
    for panel in panels:
        if panel.title:
            parts.append(f'<g class="title">{text_at(8, top + 14, _short(panel.title, 50))}</g>')
            top += 28
        parts.append(f'<g transform="translate(0 {top:g})">{"".join(panel.parts)}</g>')
        top += panel.height
        for i, (drawing, text) in enumerate(panel.keys):
            x, y = 12 + i % key_columns * 214, top + 4 + i // key_columns * 22
            label_text = text_at(54, 12, _short(text, 20 if key_columns > 1 else 50))
            parts.append(f'<g transform="translate({x} {y:g})">{drawing}{label_text}</g>')
        top += 22 * -(-len(panel.keys) // key_columns) + 16
    return svg_file(parts, WIDTH, top, label, STYLE)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


STYLE = """
.page { fill: var(--page) } .title { font-weight: 600 } .zero { stroke: var(--soft); stroke-width: 2 }
.range { fill: none; stroke: var(--ink); stroke-width: 2 } .seed { stroke: var(--soft); stroke-width: 1.5; opacity: .8 }
.hollow { fill: var(--page); stroke: var(--ink); stroke-width: 2 }
"""
