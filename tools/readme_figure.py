"""Draws docs/images/gains.svg, the figure of the README, from the laboratory's results.

Run it after the tables in docs/results/lab have changed: `python tools/readme_figure.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
LAB = DOCS / "results" / "lab"
STUDENTS = [
    ("CNN", "ladder", "CNN"),
    ("Mixer", "ladder", "MLP"),
    ("ViT", "vit", "ViT"),
]  # name, ladder, its label there
ROWS = [("no teacher", "none"), ("KD", "kd"), ("ScaleKD with KD", "scalekd"), ("own-data", "own")]

LEFT, WIDTH, TOP, BAR, GAP, GROUP = 150, 460, 78, 20, 4, 24  # pixels
HEIGHT = len(ROWS) * (BAR + GAP)  # of a student
STYLE = """
text { font: 14px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f }
.small { font-size: 12px; fill: #57606a }
.title { font-size: 15px; font-weight: 600 }
.none { fill: #afb8c1 } .kd { fill: #54aeff } .scalekd { fill: #0550ae } .own { fill: #1a7f37 }
.teacher { stroke: #bc4c00; stroke-width: 1.5; stroke-dasharray: 5 4 } .at { fill: #bc4c00 }
.interval { stroke: #24292f; stroke-width: 1.2 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 } .none { fill: #59636e } .kd { fill: #2f81f7 } .scalekd { fill: #a5d6ff }
  .own { fill: #3fb950 }
  .teacher { stroke: #f0883e } .at { fill: #f0883e } .interval { stroke: #e6edf3 }
}"""


def x(percent: float) -> float:
    return LEFT + WIDTH * percent / 75


def bars(student: str, results: dict[str, dict[str, float]], y: float) -> list[str]:
    """One student: a bar for each row of ROWS, with its 95 % interval and its gain over no teacher."""
    alone = results["no teacher"]["mean"]
    middle = y + (HEIGHT - GAP) / 2
    drawn = [f'<text x="12" y="{middle + 5:.0f}">{student}</text>']
    for row, style in ROWS:
        mean, half = results[row]["mean"], results[row]["ci95"]
        gain = "" if row == "no teacher" else f"+{mean - alone:.1f}"
        line = y + BAR / 2
        drawn += [
            f'<text class="small" x="{LEFT - 8}" y="{line + 4:.0f}" text-anchor="end">{row.replace(" with KD", " + KD")}</text>',
            f'<rect class="{style}" x="{LEFT}" y="{y}" width="{x(mean) - LEFT:.1f}" height="{BAR}"/>',
            f'<path class="interval" d="M{x(mean - half):.1f} {line}H{x(mean + half):.1f}"/>',
            f'<text class="small" x="654" y="{line + 4:.0f}" text-anchor="end">{mean:.1f} %</text>',
            f'<text x="706" y="{line + 5:.0f}" text-anchor="end">{gain}</text>',
        ]
        y += BAR + GAP
    return drawn


def figure() -> str:
    ladders = {name: json.loads((LAB / name / "summary.json").read_text()) for name in ("ladder", "vit")}
    teacher = ladders["ladder"]["teacher_top1"]
    bottom = TOP + len(STUDENTS) * (HEIGHT + GROUP) - GROUP
    drawn = [
        '<text class="title" x="12" y="24">Top-1 of small students, with and without a teacher</text>',
        '<text class="small" x="12" y="44">100 classes of real images, five seeds, mean and 95 % interval</text>',
        f'<path class="teacher" d="M{x(teacher):.1f} {TOP - 8}V{bottom + 6}"/>',
        f'<text class="small at" x="{x(teacher):.1f}" y="{TOP - 14}" text-anchor="middle">teacher (ViT) {teacher:.1f} %</text>',
    ]
    for k, (student, ladder, label) in enumerate(STUDENTS):
        drawn += bars(student, ladders[ladder]["students"][label], TOP + k * (HEIGHT + GROUP))
    size = f'width="720" height="{bottom + 16}" viewBox="0 0 720 {bottom + 16}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{STYLE}\n</style>\n' + "\n".join(drawn) + "\n</svg>\n"
    )


if __name__ == "__main__":
    (DOCS / "images").mkdir(exist_ok=True)
    (DOCS / "images" / "gains.svg").write_text(figure())
