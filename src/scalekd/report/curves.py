"""Sections of the page made from the logs of one or several runs: scores, curves, time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from scalekd.common.intervals import share_interval
from scalekd.common.text import duration
from scalekd.config.losses import apart_from_defaults

from .page import NONE, panels, section, table
from .series import events_of, figure_points, loss_points, thin, time_use
from .svg import (
    INK,
    LEFT,
    RIGHT,
    Axis,
    Curve,
    chart,
    escape,
    keys,
    legend,
    nice_ticks,
    percent_axis,
    svg_figure,
    text_at,
    value_axis,
    x_axis,
)

TOP1 = {"top1": "top-1", "top5": "top-5"}

PARTS = {
    "data": "waiting for data",
    "teacher": "teacher forward",
    "rest": "everything else: student, method, optimiser",
}
UNTAUGHT = {"data": "waiting for data", "rest": "everything else: model, losses, optimiser"}

MOST_POINTS = 20_000  # of all curves together: about 250 KB


@dataclass
class ReportRun:
    """One row of the report.

    events: `read_log` of the seed whose curves are drawn. score: the final value of the first figure in %, one per seed.
    seconds: wall clock of each seed's run. losses: the recipe's, method name -> options.
    """

    label: str
    events: list[dict[str, Any]]
    score: list[float]
    seconds: list[float]
    losses: dict[str, Any]


def scores_table(runs: Sequence[ReportRun], figures: Mapping[str, str], teacher_score: float | None) -> str:
    """The table of final scores. Gains are shown for several runs, losses if the recipes have any."""
    key, name = next(iter(figures.items()))
    head = ["run", f"{name} (%)", "gain (points)", "time", "images/s", "seeds"]
    several, named = len(runs) > 1, any(run.losses for run in runs)
    rows = [] if teacher_score is None else [["teacher", f"{teacher_score:.2f}", *[NONE] * 4, *[NONE] * named]]
    for run in runs:
        use = time_use(run.events)
        time = duration(statistics.fmean(run.seconds)) if run.seconds else NONE
        measured = run is not runs[0] and run.score and runs[0].score
        gain = f"{statistics.fmean(run.score) - statistics.fmean(runs[0].score):+.2f}" if measured else NONE
        speed = f"{1 / use[0]:,.{0 if use[0] < 0.1 else 2}f}" if use else NONE
        # losses last, so that a phone shows the numbers first
        row = [run.label, _score_text(run, key), gain, time, speed, str(len(run.score))]
        rows.append(row + [losses_text(run.losses)] * named)
    head += ["losses"] * named
    if not several:
        for line in (head, *rows):
            del line[2]
    seeds = any(len(run.score) > 1 for run in runs)
    notes = {
        f"Validation {name} at the end.": True,
        "± is the sample standard deviation over seeds.": seeds,
        "Brackets: the 95 % interval of one seed, which depends on the number of validation images.": any(
            "[" in row[1] for row in rows
        ),
        "Gains are relative to the first run.": several,
        f"Time is that of the whole run with its validations{', the mean over seeds' * seeds}; images/s is for training only.": True,
    }
    note = " ".join(line for line, holds in notes.items() if holds)
    return table(head, rows, "" if named else "numbers") + f'<p class="note">{escape(note)}</p>'


def _score_text(run: ReportRun, key: str) -> str:
    if len(run.score) > 1:
        return f"{statistics.fmean(run.score):.2f} ± {statistics.stdev(run.score):.2f}"
    if not run.score:
        return NONE
    images = [e.get("images") for e in events_of(run.events, "validation")][-1:]
    score = f"{run.score[0]:.2f}"
    if key != "top1" or not images or not images[0]:  # other figures are not shares of images
        return score
    return f"{score} [{bounds(run.score[0], images[0])}]"


def bounds(share: float, count: float) -> str:
    return "{:.2f}, {:.2f}".format(*share_interval(share, count))


def losses_text(losses: Mapping[str, Any]) -> str:
    """{"ce": {}, "kd": {"temperature": 2.0}} -> "ce, kd (temperature 2.0)"; defaults are left out."""
    changed = [apart_from_defaults(name, options or {}) for name, options in losses.items()]
    texts = [", ".join(f"{k} {v}" for k, v in options.items()) for options in changed]
    return ", ".join(f"{name} ({text})" if text else name for name, text in zip(losses, texts))


def figure_curves(runs: Sequence[ReportRun], figures: Mapping[str, str], teacher_score: float | None) -> str:
    """A chart for each figure; the first one shows the teacher's score."""
    drawn: list[str] = []
    below = False
    for key, name in figures.items():
        most = max(20, MOST_POINTS // max(1, 8 * len(runs)))
        curves = [
            Curve(thin(points, most), r.label, i)
            for i, r in enumerate(runs)
            if (points := figure_points(r.events, key))
        ]
        if not curves:
            continue
        level = None if teacher_score is None or drawn else (teacher_score, f"teacher {teacher_score:.2f} %")
        y, cut = percent_axis(curves, 0.75, level and level[0])
        below = below or cut
        x = Axis(nice_ticks(0, max(x for c in curves for x, _ in c.points), least_step=1), LEFT, RIGHT)
        figure = chart(curves, x, y, "epoch", f"{name} (%)", level)
        drawn.append(f"<figure>{figure}{legend(curves)}</figure>")
    content = panels(drawn) if drawn else "<p>No validation was logged.</p>"
    note = "One seed per run." + " The first epochs lie below the axis, which covers the later ones." * below
    return section("Validation", content, note if drawn else "")


def loss_curves(runs: Sequence[ReportRun]) -> str:
    losses = [loss_points(run.events) for run in runs]
    styles = {name: i for i, name in enumerate(dict.fromkeys(n for terms in losses for n in terms if n != "total"))}
    most = max(20, min(200, MOST_POINTS // max(1, sum(map(len, losses)))))
    drawn = []
    for run, terms in zip(runs, losses):
        curves = [Curve(thin(points, most), name, styles.get(name, INK)) for name, points in terms.items()]
        if curves:
            x = Axis(nice_ticks(0, max(c.points[-1][0] for c in curves)), LEFT, RIGHT)
            figure = chart(curves, x, value_axis([y for c in curves for _, y in c.points]), "step", "loss")
            drawn.append(f"<figure><h3>{escape(run.label)}</h3>{figure}{legend(curves)}</figure>")
    content = panels(drawn) if drawn else "<p>No training step was logged.</p>"
    note = (
        "Terms are weighted as in the total loss and averaged over log intervals. Each panel has its own vertical axis."
    )
    return section("Loss terms", content, f"{note} One seed per run.")


def time_bars(runs: Sequence[ReportRun], more: str = "") -> str:
    """Bars of the time per image by part. more: a sentence for the note."""
    uses = [(run.label, use) for run in runs if (use := time_use(run.events))]
    if not uses:
        return section("Time per image", "<p>No training step was logged.</p>")
    taught = any("teacher_share" in event for run in runs for event in run.events)
    names = PARTS if taught else UNTAUGHT
    x = Axis(nice_ticks(0, max(1000 * seconds for _, (seconds, _) in uses)), 12, RIGHT)
    row = 72
    bottom = row * len(uses) + 4
    parts = x_axis(x, 4, bottom, "milliseconds per training image")
    for i, (label, (seconds, shares)) in enumerate(uses):
        short = label if len(label) <= 44 else label[:43] + "…"
        of_part = {name: share for name, share in zip(PARTS, shares) if name in names}
        parts += [
            text_at(12, row * i + 20, short),
            *_bar(x, row * i + 27, seconds, of_part),
            text_at(12, row * i + 64, ", ".join(f"{name} {share:.1%}" for name, share in of_part.items())),
        ]
    colours = keys((_rectangle(name, 1, 1, 42, 12), text) for name, text in names.items())
    drawing = svg_figure([HATCH, *parts], bottom + 48, "Training time per image")
    note = f"Training steps only, without validation. One seed per run. {escape(more)}".rstrip()
    return section("Time per image", f"<figure>{drawing}{colours}</figure>", note)


def _bar(x: Axis, top: float, seconds: float, shares: Mapping[str, float]) -> list[str]:
    ends = [x.at(1000 * seconds * upto) for upto in accumulate(shares.values())]
    return [_rectangle(name, a, top, b - a, 20) for name, a, b in zip(shares, [x.start, *ends], ends)]


def _rectangle(part: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{part}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


# hatching tells `data` from `rest` in greyscale
HATCH = (
    '<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect class="hatch-ground" width="5" height="5"/><rect class="hatch-line" width="2" height="5"/></pattern></defs>'
)
