"""Draws line charts as inline SVG: axes with round ticks, legends, and curves that differ without colour."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from scalekd.common.text import tick_text

Point = tuple[float, float]
INK = -1  # the style of curves that are neither a run nor a single term: the teacher, the total loss
# Dash patterns and markers distinguish curves in greyscale. Six colours against five dashes: 30 styles before one repeats.
DASHES = ("", "8 3", "2 3", "9 3 2 3", "5 2")
MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.5-3.5h7v7h-7z",
    "M0-5l5 8.5h-10z",
    "M0-5l5 5l-5 5l-5-5z",
    "M-4-4l8 8m0-8l-8 8",
)
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
PALETTE_DARK = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#f0e442")  # the same set, brighter ones first
WIDTH, HEIGHT = 440, 270  # SVG units; text of 14 units is about 11 px on a phone
LEFT, RIGHT, TOP, BOTTOM = 50, 418, 40, 222


@dataclass
class Curve:
    points: list[Point]
    label: str
    style: int


def escape(text: object) -> str:
    """For HTML and XML; characters that neither allows (control characters, lone surrogates) become spaces."""
    return html.escape("".join(c if c.isprintable() else " " for c in str(text)))


def finite(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and abs(value) < 1e300  # an int may be too large for a float


@dataclass
class Axis:
    """Maps values to SVG units: the first tick lies at `start`, the last one at `end`."""

    ticks: list[float]
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.ticks[0], self.ticks[-1], value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def nice_ticks(low: float, high: float, most: int = 5, least_step: float = 0.0) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose low and high; two at least."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = max(abs(high) * 0.05, least_step) or 1.0
        low, high = low - margin, high + margin
    raw = max((high - low) / most, least_step)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that enclose low and high; only powers where those are more than seven."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [m * 10.0**k for k in range(first, last + 1) for m in (1, 2, 5)]
    start, end = max(t for t in ticks if t <= low), min(t for t in ticks if t >= high)
    ticks = [t for t in ticks if start <= t <= end]
    stride = math.ceil((last - first) / 6)
    return ticks if len(ticks) <= 7 else [10.0**k for k in range(first, last + stride, stride)]


def value_axis(values: Sequence[float]) -> Axis:
    """A vertical axis, logarithmic if positive values differ by more than a factor of 30."""
    low, high = min(values), max(values)
    log = low > 0 and high / low > 30
    return Axis(log_ticks(low, high) if log else nice_ticks(low, high), BOTTOM, TOP, log)


def percent_axis(curves: Sequence[Curve], late: float, level: float | None = None) -> tuple[Axis, bool]:
    """A vertical axis within 0 to 100 % for curves that rise, and whether some points lie below it.

    It covers the last part of each curve, the share `late`, every point above that, and `level`. Early points would
    compress the rest, so they may lie below the axis.
    """
    more = [] if level is None else [level]
    low = min([y for c in curves for _, y in c.points[int(len(c.points) * (1 - late)) :]] + more)
    high = max([y for c in curves for _, y in c.points] + more)
    if high - low < 0.01:
        low, high = max(0.0, low - 5), min(100.0, high + 5)
    axis = Axis(nice_ticks(low, high), BOTTOM, TOP)
    return axis, any(y < axis.ticks[0] for c in curves for _, y in c.points)


def svg_figure(parts: Iterable[str], height: float, label: str) -> str:
    box = f"0 0 {WIDTH} {height:g}"
    return f'<svg class="figure" role="img" viewBox="{box}" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def text_at(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def x_axis(axis: Axis, top: float, bottom: float, label: str) -> list[str]:
    ticks = [
        f'<path class="grid" d="M{axis.at(t):.1f} {top:g}V{bottom:g}"/>'
        + text_at(axis.at(t), bottom + 19, tick_text(t), "middle")
        for t in axis.ticks
    ]
    return [*ticks, text_at((axis.start + axis.end) / 2, bottom + 40, label, "middle")]


def y_axis(axis: Axis, label: str) -> list[str]:
    ticks = [
        f'<path class="grid" d="M{LEFT} {axis.at(t):.1f}H{RIGHT}"/>'
        + text_at(LEFT - 6, axis.at(t) + 5, tick_text(t), "end")
        for t in axis.ticks
    ]
    return [*ticks, text_at(4, 14, label + (", logarithmic" if axis.log else ""))]


def line(points: Sequence[Point], style: int, marked: Iterable[int]) -> str:
    """A polyline in SVG units with markers at some of its points."""
    if style == INK:
        name, dash, shape = "ink", "", ""
    else:
        name, dash, shape = f"s{style % len(PALETTE)}", DASHES[style % len(DASHES)], MARKERS[style % len(MARKERS)]
    where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    line = f'<polyline class="line {name}" points="{where}"' + (f' stroke-dasharray="{dash}"/>' if dash else "/>")
    shape = shape or (MARKERS[0] if len(points) == 1 else "")  # a single point is invisible as a line
    marks = [
        f'<path class="mark {name}" transform="translate({x:.1f} {y:.1f})" d="{shape}"/>'
        for x, y in (points[i] for i in marked)
        if shape
    ]
    return line + "".join(marks)


def chart(
    curves: Sequence[Curve], x: Axis, y: Axis, x_label: str, y_label: str, level: tuple[float, str] | None = None
) -> str:
    """Curves over axes. `level` is a horizontal line and its text. Curves are clipped to the axes."""
    parts = chart_parts(curves, x, y, x_label, y_label, level)
    return svg_figure(parts, HEIGHT, f"{y_label} against {x_label}: {', '.join(c.label for c in curves)}")


def chart_parts(
    curves: Sequence[Curve], x: Axis, y: Axis, x_label: str, y_label: str, level: tuple[float, str] | None = None
) -> list[str]:
    """The parts of the figure of `chart`, WIDTH x HEIGHT."""
    parts = x_axis(x, TOP, BOTTOM, x_label) + y_axis(y, y_label)
    box = f"{LEFT - 6} {TOP - 6} {RIGHT - LEFT + 12} {BOTTOM - TOP + 12}"
    left, top, width, height = box.split()
    parts.append(f'<svg x="{left}" y="{top}" width="{width}" height="{height}" viewBox="{box}">')
    if level:
        parts.append(line([(LEFT, y.at(level[0])), (RIGHT, y.at(level[0]))], INK, ()))
    for curve in sorted(curves, key=lambda c: c.style != INK):  # the total goes beneath the terms
        count, every = len(curve.points), math.ceil(len(curve.points) / 8)
        marked = {*range(min(max(curve.style, 0), count - 1) % every, count, every), count - 1}
        parts.append(line([(x.at(a), y.at(b)) for a, b in curve.points], curve.style, sorted(marked)))
    parts.append("</svg>")
    if level:
        parts.append(text_at(LEFT + 6, y.at(level[0]) - 6, level[1]))
    return parts


def legend(curves: Sequence[Curve]) -> str:
    return keys((curve_key(c), escape(c.label)) for c in curves)


def curve_key(curve: Curve) -> str:
    """The curve's line and marker in a box of 44 x 14."""
    return line([(1, 7), (22, 7), (43, 7)], curve.style, [1])


def keys(keys: Iterable[tuple[str, str]]) -> str:
    items = (
        f'<li><svg width="44" height="14" viewBox="0 0 44 14" aria-hidden="true">{drawing}</svg>{text}</li>'
        for drawing, text in keys
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def drawing_style() -> str:
    """The CSS of the drawings, light and dark, for a page or a separate SVG file."""
    light, dark = (" ".join(f".s{i} {{ --c: {c} }}" for i, c in enumerate(p)) for p in (PALETTE, PALETTE_DARK))
    return STYLE.replace("%LIGHT%", light).replace("%DARK%", dark)


def svg_file(parts: Iterable[str], width: float, height: float, label: str, style: str) -> str:
    """A separate SVG file with the CSS of the drawings and `style`, on the page's background colour."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{1.25 * width:g}" height="{1.25 * height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        f"<style>svg {{ font-family: system-ui, sans-serif }}{drawing_style()}{style}</style>"
        f'<rect class="page" width="100%" height="100%"/>{"".join(parts)}</svg>\n'
    )


STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --soft: #595959; --grid: #ddd }
%LIGHT%
@media (prefers-color-scheme: dark) {
  :root { --page: #141414; --ink: #eee; --soft: #aaa; --grid: #3a3a3a }
  %DARK%
}
text { fill: var(--ink); font-size: 14px; paint-order: stroke; stroke: var(--page); stroke-width: 3px; stroke-linejoin: round }
.grid { stroke: var(--grid); stroke-width: 1 } .ink { --c: var(--ink) }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round } .line.ink { stroke-width: 1.5 }
.mark { fill: var(--c); stroke: var(--c); stroke-width: 1.5 }
"""
