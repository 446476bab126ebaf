"""Sections of the page on predictions: accuracy, classes, confusions, examples, calibration."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from scalekd.common.text import shortened

from .curves import bounds
from .evaluate import STUDENT, TEACHER, Example, Seen
from .page import NONE, panels, section, table
from .predictions import accuracies, by_class, confusion_matrix, confusions, worst_and_best
from .svg import (
    INK,
    LEFT,
    RIGHT,
    Axis,
    Curve,
    chart,
    escape,
    finite,
    legend,
    nice_ticks,
    svg_figure,
    text_at,
    value_axis,
)

MATRIX, NUMBERED = 30, 12  # most classes of a confusion matrix, and of one with numbers in its cells
PAIRS = 12
FEW = 10  # images per class below which a note says so
LEAST_IN_BIN = 10  # images of a bin that is drawn


def answer_sections(seen: Seen) -> list[str]:
    count = f"{seen.images:,} of {seen.of_images:,}" if seen.images < seen.of_images else f"{seen.images:,}"
    return [
        _accuracy(seen, f"On {count} validation images, the same for all models. {' '.join(seen.notes)}".rstrip()),
        _classes(seen),
        _confusions(seen),
        _examples(seen.examples),
        _calibration(seen),
    ]


def name(text: str) -> str:
    return shortened(text, 40)


def _accuracy(seen: Seen, note: str) -> str:
    rows = []
    for row in accuracies(seen):
        gain = f"{row['gain']:+.2f}" if "gain" in row else NONE
        gain += f" ± {row['half_width']:.2f}" if finite(row.get("half_width")) else ""
        cells = [row["model"], f"{row['top1']:.2f} [{bounds(row['top1'], row['images'])}]", gain]
        cells += [NONE if row[key] is None else f"{row[key]:{form}}" for key, form in COLUMNS.items()]
        rows.append(cells)
    head = [
        "model",
        "top-1 (%)",
        "student's gain (points)",
        "agrees with the teacher (%)",
        "KL",
        "NLL",
        "ECE (%)",
    ]
    note += (
        " Brackets and ±: 95 % intervals, which depend on the number of images; the interval of a gain is over paired "
        "images. KL (from the teacher) and NLL are in nats. ECE: expected calibration error."
    )
    return section(
        "Comparison with the teacher" if TEACHER in seen.columns else "Accuracy",
        table(head, rows, "numbers"),
        escape(note),
    )


COLUMNS = {"agreement": ".2f", "kl": ".4f", "nll": ".4f", "ece": ".2f"}


def _classes(seen: Seen) -> str:
    rows, note = worst_and_best(by_class(seen), "Sorted by the student's accuracy, the worst first.")
    if seen.images < FEW * len(seen.classes):
        note += f" {seen.images / len(seen.classes):.3g} images per class are few"
        note += "; `scalekd report --images` uses more." if seen.images < seen.of_images else "."
    others = [label for label in seen.columns if label != STUDENT]
    head = ["class", "images", "this student", *others]
    cells = [
        [name(row["class"]), str(row["images"]), *(f"{row['top1'][label]:.1f}" for label in (STUDENT, *others))]
        for row in rows
    ]
    return section("Top-1 by class (%)", table(head, cells, "numbers"), note)


def _confusions(seen: Seen) -> str:
    pairs = confusions(seen, PAIRS)
    if not pairs:
        return section("Confusions", "<p>The student classifies every image correctly.</p>")
    head = ["class", "predicted as", "images", "of the class"]
    rows = [[name(p["class"]), name(p["taken_for"]), str(p["images"]), f"{p['images'] / p['of']:.1%}"] for p in pairs]
    if TEACHER in seen.columns:
        head.append("by the teacher")
        for row, pair in zip(rows, pairs):
            row.append(str(pair["teacher"]))
    content = [table(head, rows, "numbers names")]
    note = "The student's most frequent confusions."
    if len(seen.classes) <= MATRIX:
        content.append(f"<figure>{_matrix(seen)}</figure>")
        note += " Matrix: rows are the true class, columns the student's prediction; darker cells are a larger share of their row."
    return section("Confusions", "".join(content), note)


def _matrix(seen: Seen) -> str:
    counts = confusion_matrix(seen.columns[STUDENT], len(seen.classes))
    n, left = len(seen.classes), 96.0
    cell = (RIGHT + 16 - left) / n
    parts = ['<g class="faint">']
    for i, label in enumerate(seen.classes):
        middle = cell * (i + 0.5)
        short = shortened(label, 11).replace(" ...", "…")
        parts.append(text_at(left - 5, middle + 4, short, "end"))
        parts.append(f'<g transform="translate({left + middle + 4:.1f} {cell * n + 6:.1f}) rotate(-60)">')
        parts.append(f"{text_at(0, 0, short, 'end')}</g>")
        for j in range(n):
            x, y = left + cell * j, cell * i
            share = counts[i, j] / max(1, counts[i].sum())
            parts.append(
                f'<rect class="shade" x="{x:.1f}" y="{y:.1f}" width="{cell:.1f}" height="{cell:.1f}" fill-opacity="{share:.2f}"/>'
            )
            if n <= NUMBERED and counts[i, j]:
                over = ' class="over"' if share > 0.5 else ""
                parts.append(
                    f'<text{over} x="{x + cell / 2:.1f}" y="{y + cell / 2 + 4:.1f}" text-anchor="middle">{counts[i, j]}</text>'
                )
    frame = f'<rect x="{left}" y="0" width="{cell * n:.1f}" height="{cell * n:.1f}" fill="none" class="grid"/>'
    return svg_figure([*parts, "</g>", frame], cell * n + 84, "Confusion matrix of the student")


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    figures = []
    for e in examples:
        data = base64.b64encode(e.picture).decode()
        text = f"{name(e.target)} (teacher, {e.teacher_confidence:.0%}); student: {name(e.student)}, {e.student_confidence:.0%}"
        small = ' class="small"' if e.small else ""
        figures.append(
            f'<figure><img{small} src="data:image/{e.kind};base64,{data}" alt="{escape(text)}" title="{escape(shortened(e.name, 120))}">'
            f"<figcaption><b>{escape(name(e.target))}</b> ({e.teacher_confidence:.0%})<br>student: {escape(name(e.student))} "
            f"({e.student_confidence:.0%})</figcaption></figure>"
        )
    note = (
        "The images with the teacher's highest confidence, at most three per class, cropped as the models see them. Bold: the true "
        "class and the teacher's confidence. Below: the student's prediction and confidence. The tooltip has the file name."
    )
    return section(
        "Correct by the teacher, wrong by the student", f'<div class="pictures">{"".join(figures)}</div>', note
    )


def _calibration(seen: Seen) -> str:
    curves = []
    for i, (label, result) in enumerate(seen.results.items()):
        filled = [b for b in result["bins"] if b["images"] >= LEAST_IN_BIN]
        points = [(100 * b["confidence"], 100 * b["accuracy"]) for b in filled]
        if points:
            curves.append(Curve(points, f"{label}: ECE {result['ece']:.2f} %", i))
    if not curves:
        few = f"<p>None of the fifteen bins of the largest probability has {LEAST_IN_BIN} images, so there is no curve.</p>"
        return section("Calibration", few)
    diagonal = Curve([(0.0, 0.0), (100.0, 100.0)], "perfect calibration", INK)
    x = Axis(nice_ticks(0, 100), LEFT, RIGHT)
    figure = chart([*curves, diagonal], x, value_axis([0.0, 100.0]), "mean confidence (%)", "accuracy (%)")
    note = (
        "Each point is one of fifteen bins of the largest probability. Below the diagonal a model is overconfident. "
        f"Bins of fewer than {LEAST_IN_BIN} images are not drawn but count in the ECE."
    )
    return section("Calibration", panels([f"<figure>{figure}{legend([*curves, diagonal])}</figure>"]), note)


def numbers(seen: Seen) -> dict[str, Any]:
    """The data behind these sections, for report.json."""
    shown = [{k: v for k, v in vars(e).items() if k not in ("picture", "kind", "small")} for e in seen.examples]
    return {
        "images": seen.images,
        "of_images": seen.of_images,
        "notes": seen.notes,
        "accuracy": accuracies(seen),
        "classes": by_class(seen),
        "confusions": confusions(seen, 100),
        "calibration": {label: result["bins"] for label, result in seen.results.items()},
        "examples": shown,
    }
