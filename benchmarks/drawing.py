"""Draws the figures of docs/explanation/performance-tables.md from the JSON files of docs/results/performance, for tables.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scalekd.report.svg import (
    BOTTOM,
    HEIGHT,
    INK,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Curve,
    curve_key,
    line,
    nice_ticks,
    svg_file,
    text_at,
    y_axis,
)

ROW = 26  # height of a bar's row
BARS_FROM, BARS_TO = 275, 550  # the longest name of a part is beside them
LITERAL = "losses, literal DCT"
Drawing = tuple[str, list[str], float]  # title, SVG elements height

# ---------------------------------------------------------------- parts


def parts(found: dict[str, Any], pair: str) -> str:
    """Bars: the parts of the floor, the parts of ScaleKD, and in outline the literal loss, which no step here computes."""
    own = {name: values for name, values in found["parts"].items() if name != LITERAL}
    groups = {
        f"The floor, {pair}, batch {found['batch']}": found["floor"],
        "What ScaleKD adds, published form": own,
        "In place of our losses, not in the step": {LITERAL: found["parts"][LITERAL]},
    }
    longest = max(values[2] for rows in groups.values() for values in rows.values())
    axis = Axis(nice_ticks(0, 1000 * longest), BARS_FROM, BARS_TO)
    kinds = ("floor", "own", "outline")
    drawings = [(title, bars(rows, axis, kind), ROW * len(rows)) for (title, rows), kind in zip(groups.items(), kinds)]
    return file(drawings, [], f"where a step's time goes, {pair}", BARS_TO + 50)


def bars(rows: dict[str, list[float]], axis: Axis, kind: str) -> list[str]:
    """Medians as bars with their values in ms; a line through the end of each bar spans the quartiles."""
    drawn = [f'<path class="grid" d="M{axis.at(t):.1f} 0V{ROW * len(rows)}"/>' for t in axis.ticks]
    for i, (name, values) in enumerate(rows.items()):
        y = ROW * i + ROW / 2
        low, end, high = (axis.at(1000 * v) for v in values)
        drawn += [
            text_at(axis.start - 8, y + 5, name, "end"),
            f'<rect class="bar {kind}" x="{axis.start:g}" y="{y - 8:g}" width="{end - axis.start:.1f}" height="16"/>',
            f'<path class="spread" d="M{low:.1f} {y:g}H{high:.1f}"/>',
            text_at(high + 6, y + 5, f"{1000 * values[1]:.0f} ms"),
        ]
    return drawn


# ---------------------------------------------------------------- growth


def growth(found: dict[str, Any]) -> str:
    """Multiply-adds relative to the floor's, by what grows, and memory relative to that of `fd`."""
    forms = list(found["forms"])
    drawings = []
    for part in found["growth"]:
        if part["grows"] != "batch":
            drawings.append(panel(part, "gmacs", "floor", ["fd", *forms]))
        if part["grows"] != "pixels":
            drawings.append(panel(part, "memory_mb", "fd", forms))
    shown = [Curve([], name, style_of(name, forms)) for name in ("fd", *forms)]
    return file(drawings, [(curve_key(c), c.label) for c in shown], "how a step's cost grows")


def panel(part: dict[str, Any], key: str, base: str, names: Sequence[str]) -> Drawing:
    """Connected points at equal distances. The axis starts at 1, which is `base`."""
    at, forms = part["at"], [name for name in names if name != "fd"]
    step = (RIGHT - LEFT) / len(at)
    places = [LEFT + step * (i + 0.5) for i in range(len(at))]
    values = {name: [steps[name][key] / steps[base][key] for steps in at.values()] for name in names}
    axis = Axis(nice_ticks(1, max(map(max, values.values()))), BOTTOM, TOP)
    unit, over = {"gmacs": ("GMACs", "the floor's"), "memory_mb": ("memory", "that of fd")}[key]
    drawn = y_axis(axis, f"{unit}, times {over}")
    drawn += [text_at(x, BOTTOM + 19, name, "middle") for x, name in zip(places, at, strict=True)]
    drawn.append(text_at((LEFT + RIGHT) / 2, BOTTOM + 38, part["grows"], "middle"))
    for name, ys in values.items():
        points = [(x, axis.at(y)) for x, y in zip(places, ys, strict=True)]
        drawn.append(line(points, style_of(name, forms), range(len(points))))
    return part["of"], drawn, HEIGHT


def style_of(name: str, forms: Sequence[str]) -> int:
    return INK if name == "fd" else list(forms).index(name)


# ---------------------------------------------------------------- files


def file(drawings: Sequence[Drawing], keys: Sequence[tuple[str, str]], label: str, width: float = WIDTH) -> str:
    """An SVG file of drawings with titles below each other and a legend at the end, for light and dark pages."""
    placed, top = [], 10.0
    for title, drawn, height in drawings:
        placed.append(f'<g class="title">{text_at(8, top + 14, title)}</g>')
        placed.append(f'<g transform="translate(0 {top + 26:g})">{"".join(drawn)}</g>')
        top += height + 36
    for drawing, text in keys:
        placed.append(f'<g transform="translate(12 {top:g})">{drawing}{text_at(54, 12, text)}</g>')
        top += 22
    return svg_file(placed, width, top, label, STYLE)


STYLE = """
.page { fill: var(--page) } .title { font-weight: 600 } .bar.floor { fill: var(--soft) } .bar.own { fill: var(--c) }
.bar.own, .bar.outline { --c: #0072b2 } .bar.outline { fill: var(--page); stroke: var(--c); stroke-width: 2 }
.spread { stroke: var(--ink); stroke-width: 2 }
@media (prefers-color-scheme: dark) { .bar.own, .bar.outline { --c: #56b4e9 } }
"""
