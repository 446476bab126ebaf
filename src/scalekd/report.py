"""One HTML file that compares runs: table, curves, where the time went. Offline, no scripts, readable on a phone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import write_text
from .runlog import duration
from .svg import (
    INK,
    LEFT,
    RIGHT,
    Axis,
    Curve,
    Point,
    chart,
    drawing_style,
    escape,
    finite,
    keys,
    legend,
    nice_ticks,
    svg_figure,
    text_at,
    value_axis,
    x_axis,
)

NONE = "\N{EN DASH}"  # an empty cell of the table

PARTS = (
    ("data", "waiting for data"),
    ("teacher", "teacher forward"),
    ("rest", "everything else: student, method, optimiser"),
)

MOST_POINTS = 20_000  # of all curves together: about 250 KB


@dataclass
class ReportRun:
    """One row of the report.

    events: `read_log` of the seed whose curves are drawn. top1: final validation top-1 in %, one per seed.
    seconds: wall clock of each seed's run. losses: the recipe's, method name -> options.
    """

    label: str
    events: list[dict[str, Any]]
    top1: list[float]
    seconds: list[float]
    losses: dict[str, Any]


def write_report(
    path: Path, *, title: str, runs: list[ReportRun], facts: dict[str, str], teacher_top1: float | None = None
) -> None:
    """Writes one self-contained HTML file; the first run is the baseline that gains are measured against."""
    teacher_top1 = teacher_top1 if finite(teacher_top1) else None
    sections = [
        _table(runs, teacher_top1),
        _accuracy_figure(runs, teacher_top1),
        _loss_figures(runs),
        _time_figure(runs),
        facts_section(facts),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page(escape(title), sections))


# ---------------------------------------------------------------- numbers from the events


def events_of(events: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Events of a kind by step. A resumed run repeats the steps after its checkpoint: the later events count."""
    kept: list[dict[str, Any]] = []
    for event in events:
        if event.get("event") == kind and finite(event.get("step")):
            while kept and kept[-1]["step"] >= event["step"]:
                kept.pop()
            kept.append(event)
    return kept


def accuracy_points(events: Iterable[dict[str, Any]]) -> list[Point]:
    """(epoch, top-1 in %) of every validation."""
    pairs = [(e.get("epoch"), e.get("top1")) for e in events_of(events, "validation")]
    return [(float(x), float(y)) for x, y in pairs if finite(x) and finite(y)]


def loss_points(events: Iterable[dict[str, Any]]) -> dict[str, list[Point]]:
    """Term -> (step, value). `total` is left out where it repeats the only term."""
    terms: dict[str, list[Point]] = {}
    for event in events_of(events, "step"):
        for name, value in (event.get("losses") or {}).items():
            if finite(value):
                terms.setdefault(name, []).append((float(event["step"]), float(value)))
    if len(terms) == 2:
        terms.pop("total", None)
    return terms


def time_use(events: Iterable[dict[str, Any]]) -> tuple[float, tuple[float, float, float]] | None:
    """Seconds per training image, and the shares of waiting for data, teacher forward and the rest.

    None without step events. The log tells no batch size, but it is the same in every interval, so that
    steps / images_per_s is each interval's time up to a factor. On a GPU the teacher may run while the
    loop waits for data; where the two add up to more than 1 they are scaled down to it.
    """
    steps = time = data = teacher = before = 0.0
    for event in events_of(events, "step"):
        count, before = event["step"] - before, event["step"]
        speed, waiting, teaching = (event.get(k) for k in ("images_per_s", "data_share", "teacher_share"))
        if finite(speed) and speed > 0 and finite(waiting) and finite(teaching):
            steps, time = steps + count, time + count / speed
            data, teacher = data + waiting * count / speed, teacher + teaching * count / speed
    if not time:
        return None
    whole = max(time, data + teacher)
    return time / steps, (data / whole, teacher / whole, (whole - data - teacher) / whole)


def thin(points: list[Point], most: int) -> list[Point]:
    """At most about `most` points: means of neighbours, and the last point as it is."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    return [(statistics.fmean(x for x, _ in g), statistics.fmean(y for _, y in g)) for g in groups] + points[-1:]


# ---------------------------------------------------------------- parts of the page


def _table(runs: Sequence[ReportRun], teacher_top1: float | None) -> str:
    rows = [] if teacher_top1 is None else [("teacher", f"{teacher_top1:.2f}", *[NONE] * 5)]
    for run in runs:
        use = time_use(run.events)
        time = duration(statistics.fmean(run.seconds)) if run.seconds else NONE
        measured = run is not runs[0] and run.top1 and runs[0].top1
        gain = f"{statistics.fmean(run.top1) - statistics.fmean(runs[0].top1):+.2f}" if measured else NONE
        speed = f"{1 / use[0]:,.0f}" if use else NONE
        rows.append((run.label, _top1_text(run.top1), gain, time, speed, str(len(run.top1)), _losses_text(run.losses)))
    # losses last: on a phone the numbers are in sight
    names = ("run", "top-1 (%)", "gain (points)", "time", "images/s", "seeds", "losses")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    lines = [
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    ]
    note = (
        "Validation top-1 after the last epoch; ± is the sample standard deviation over seeds. Gains are over the "
        "first run. Time is a whole run with its validations, the mean over seeds; images/s is training alone."
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        f'<p class="note">{note}</p>'
    )


def _top1_text(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else NONE
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def _losses_text(losses: dict[str, Any]) -> str:
    """{"ce": {}, "kd": {"temperature": 2.0}} -> "ce, kd (temperature 2.0)"."""
    texts = [", ".join(f"{k} {v}" for k, v in (options or {}).items()) for options in losses.values()]
    return ", ".join(f"{name} ({text})" if text else name for name, text in zip(losses, texts))


def _accuracy_figure(runs: Sequence[ReportRun], teacher_top1: float | None) -> str:
    most = max(20, MOST_POINTS // max(1, len(runs)))
    curves = [
        Curve(thin(points, most), r.label, i) for i, r in enumerate(runs) if (points := accuracy_points(r.events))
    ]
    if not curves:
        return section("Validation accuracy", "<p>No validation was logged.</p>")
    # the first epochs would press the rest together: the axis is made for the last three quarters of each curve
    shown = [y for c in curves for _, y in c.points[len(c.points) // 4 :]] + (
        [] if teacher_top1 is None else [teacher_top1]
    )
    x = Axis(nice_ticks(0, max(x for c in curves for x, _ in c.points), least_step=1), LEFT, RIGHT)
    level = None if teacher_top1 is None else (teacher_top1, f"teacher {teacher_top1:.2f} %")
    figure = chart(curves, x, value_axis(shown), "epoch", "top-1 (%)", level)
    return section(
        "Validation accuracy",
        f"<figure>{figure}{legend(curves)}</figure>",
        "One seed per run. Early epochs may lie below the axis.",
    )


def _loss_figures(runs: Sequence[ReportRun]) -> str:
    losses = [loss_points(run.events) for run in runs]
    styles = {name: i for i, name in enumerate(dict.fromkeys(n for terms in losses for n in terms if n != "total"))}
    most = max(20, min(200, MOST_POINTS // max(1, sum(map(len, losses)))))
    figures = []
    for run, terms in zip(runs, losses):
        curves = [Curve(thin(points, most), name, styles.get(name, INK)) for name, points in terms.items()]
        if curves:
            x = Axis(nice_ticks(0, max(c.points[-1][0] for c in curves)), LEFT, RIGHT)
            figure = chart(curves, x, value_axis([y for c in curves for _, y in c.points]), "step", "loss")
            figures.append(f"<figure><h3>{escape(run.label)}</h3>{figure}{legend(curves)}</figure>")
    content = f'<div class="panels">{"".join(figures)}</div>' if figures else "<p>No training step was logged.</p>"
    return section(
        "Loss terms",
        content,
        "Weighted, as they are added up, and averaged over log intervals. Each panel has its own "
        "vertical axis. One seed per run.",
    )


def _time_figure(runs: Sequence[ReportRun]) -> str:
    uses = [(run.label, use) for run in runs if (use := time_use(run.events))]
    if not uses:
        return section("Where the time went", "<p>No training step was logged.</p>")
    x = Axis(nice_ticks(0, max(1000 * seconds for _, (seconds, _) in uses)), 12, RIGHT)
    row = 72
    bottom = row * len(uses) + 4
    parts = x_axis(x, 4, bottom, "milliseconds per training image")
    for i, (label, (seconds, shares)) in enumerate(uses):
        short = label if len(label) <= 44 else label[:43] + "…"
        parts += [
            text_at(12, row * i + 20, short),
            *_bar(x, row * i + 27, seconds, shares),
            text_at(12, row * i + 64, ", ".join(f"{name} {share:.1%}" for (name, _), share in zip(PARTS, shares))),
        ]
    colours = keys((_rectangle(name, 1, 1, 42, 12), text) for name, text in PARTS)
    drawing = svg_figure([HATCH, *parts], bottom + 48, "Training time per image")
    return section(
        "Where the time went",
        f"<figure>{drawing}{colours}</figure>",
        "Training steps alone, without validation. One seed per run.",
    )


def _bar(x: Axis, top: float, seconds: float, shares: Sequence[float]) -> list[str]:
    ends = [x.at(1000 * seconds * sum(shares[: i + 1])) for i in range(len(shares))]
    return [_rectangle(name, a, top, b - a, 20) for (name, _), a, b in zip(PARTS, [x.start, *ends], ends)]


def _rectangle(part: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{part}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def facts_section(facts: dict[str, str]) -> str:
    return section(
        "Facts", f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in facts.items())}</dl>"
    )


def section(title: str, content: str, note: str = "") -> str:
    return f"<section><h2>{title}</h2>{content}" + (f'<p class="note">{note}</p>' if note else "") + "</section>"


def page(title: str, sections: Sequence[str], style: str = "") -> str:
    """The whole file; title and sections are HTML, `style` goes after the report's own."""
    body = "\n".join(sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>{drawing_style()}{STYLE}{style}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""


# hatching tells `data` from `rest` in greyscale
HATCH = (
    '<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect class="hatch-ground" width="5" height="5"/><rect class="hatch-line" width="2" height="5"/></pattern></defs>'
)

STYLE = """
:root { --rest: #c4c4c4 } .data, .hatch-ground { --f: #e69f00 } .teacher { --f: #0072b2 }
@media (prefers-color-scheme: dark) { :root { --rest: #777 } .teacher { --f: #56b4e9 } }
body { margin: 0 auto; padding: 16px; max-width: 960px; background: var(--page); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem } h3 { font-size: 1rem; margin: .5rem 0 }
.note { color: var(--soft); font-size: .875rem; max-width: 44rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; overflow-wrap: normal }
th, td { text-align: right; padding: .4rem .5rem; border-bottom: 1px solid var(--grid); font-variant-numeric: tabular-nums }
td { white-space: nowrap } th:first-child, th:last-child, td:last-child { text-align: left; white-space: normal }
td:last-child { min-width: 12rem }
figure { margin: 0; max-width: 540px; min-width: 0 } svg.figure { display: block; width: 100%; height: auto; overflow: visible }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 16px 24px }
.legend { list-style: none; margin: .25rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .875rem }
.legend svg { vertical-align: -2px; margin-right: .35rem }
.teacher { fill: var(--f) } .data { fill: url(#hatch) } .rest { fill: var(--rest) }
.hatch-ground { fill: var(--f) } .hatch-line { fill: var(--page) }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .3rem 1rem }
dt { color: var(--soft) } dd { margin: 0 }
"""
