"""The figures of `scalekd analyze similarity`. Each function returns a matplotlib figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from scalekd.common.text import shortened

from .figures import figure_class, short

MOST_CLASSES = 40  # in a figure; with more classes, those with the largest and smallest gains


def draw_cka(runs: Sequence[dict[str, Any]]) -> Any:
    """A matrix of 4 x 4 stages for each run."""
    figure_of, _ = figure_class()
    columns = min(4, len(runs))
    rows = math.ceil(len(runs) / columns)
    figure = figure_of(figsize=(max(4.2, 3.3 * columns + 0.8), 3.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, run in zip(panels, runs):
        values = np.array(run["cka"], dtype=float)
        image = panel.imshow(values, cmap="viridis", vmin=0, vmax=1)
        for s, t in np.ndindex(4, 4):
            shade = "black" if values[s, t] > 0.55 else "white"
            panel.text(t, s, f"{values[s, t]:.2f}", ha="center", va="center", color=shade, fontsize=9)
        panel.set_xticks(range(4), range(1, 5))
        panel.set_yticks(range(4), range(1, 5))
        panel.set(xlabel="teacher's stage", ylabel="student's stage")
        panel.set_title(short(run["run"]), fontsize=10)
    for panel in panels[len(runs) :]:
        panel.set_visible(False)
    figure.colorbar(image, ax=panels.tolist(), label="linear CKA")
    return figure


def draw_calibration(found: dict[str, Any], teacher: str) -> Any:
    """A reliability diagram for each model, with the images of each bin below."""
    figure_of, _ = figure_class()
    models = [{"run": teacher} | found["teacher_answers"]] if found["teacher_answers"] else []
    models += found["runs"]
    columns = min(4, len(models))
    rows = math.ceil(len(models) / columns)
    figure = figure_of(figsize=(max(4.0, 3.2 * columns), 4.4 * rows), layout="constrained")
    ratios = [3, 1] * rows
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=ratios, sharex=True)
    for i in range(rows * columns):
        above, below = grid[2 * (i // columns)][i % columns], grid[2 * (i // columns) + 1][i % columns]
        if i >= len(models):
            above.set_visible(False)
            below.set_visible(False)
            continue
        m = models[i]
        filled = [b for b in m["bins"] if b["images"]]
        middles, width = [(b["from"] + b["to"]) / 2 for b in filled], 1 / len(m["bins"])
        style = {"width": width, "edgecolor": "#333333", "linewidth": 0.8}
        above.bar(middles, [b["accuracy"] for b in filled], color="#9ecae1", **style)
        above.plot(
            middles, [b["confidence"] for b in filled], "_", color="black", markersize=11, markeredgewidth=2.2,
            label="mean confidence",
        )  # fmt: skip
        above.plot([0, 1], [0, 1], "--", color="#666666", linewidth=1)
        above.set(ylim=(0, 1.02), xlim=(0, 1), ylabel="accuracy")
        above.set_title(f"{short(m['run'])}\nECE {m['ece']:.2f} %, NLL {m['nll']:.3f}", fontsize=9)
        below.bar(middles, [b["images"] / found["images"] for b in filled], color="#bbbbbb", **style)
        below.set(xlabel="confidence", ylabel="images", ylim=(0, 1), xticks=[0, 0.25, 0.5, 0.75])
        if i == 0:
            above.legend(fontsize=8, loc="upper left")
    return figure


def draw_classes(gains: dict[str, list[dict[str, Any]]], baseline: str) -> Any:
    """A panel for each run: gains by class, sorted, with 95 % intervals."""
    figure_of, _ = figure_class()
    shown = {run: _ends(rows) for run, rows in gains.items()}
    most = max(len(rows) for rows in shown.values())
    figure = figure_of(figsize=(5.4 * len(shown), 1.4 + 0.24 * most), layout="constrained")
    for axes, (run, rows) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items()):
        heights = range(len(rows) - 1, -1, -1)
        values = [row["gain"] for row in rows]
        bars = axes.barh(
            heights, values, xerr=[row["half_width"] or 0.0 for row in rows], edgecolor="#333333", linewidth=0.8,
            error_kw={"linewidth": 1.0, "ecolor": "black", "capsize": 2},
        )  # fmt: skip
        for bar, value in zip(bars, values):
            bar.set(facecolor="#0072b2" if value >= 0 else "#f6b26b", hatch="" if value >= 0 else "////")
        axes.set_yticks(heights, [f"{shortened(row['class'], 28)} ({row['images']})" for row in rows], fontsize=8)
        axes.axvline(0, color="black", linewidth=1)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.set_xlabel("gain of top-1, points; line: 95 % interval")
        left = len(gains[run]) - len(rows)
        note = f"\nthe {len(rows)} largest and smallest gains of {len(gains[run])} classes" if left else ""
        axes.set_title(f"{short(run)} compared with {short(baseline)}{note}", fontsize=9)
        axes.grid(True, axis="x", color="#dddddd")
        axes.set_axisbelow(True)
    return figure


def _ends(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    half = MOST_CLASSES // 2
    return rows if len(rows) <= MOST_CLASSES else rows[:half] + rows[-half:]


def draw_attention(attention: dict[str, Any], titles: Sequence[str]) -> Any:
    """A row per image: the image, the mean over queries, and single queries, each with a cross at its position."""
    figure_of, _ = figure_class()
    images, maps, grid = attention["pixels"], attention["maps"], attention["grid"]
    columns = 1 + len(maps[0])
    figure = figure_of(figsize=(1.75 * columns, 0.7 + 1.95 * len(images)), layout="constrained")
    figure.suptitle(
        f"{short(attention['run'])}, {attention['projector']}: attention over the student's map, mean over heads; "
        "x: the query's position", fontsize=9,
    )  # fmt: skip
    rows = figure.subplots(len(images), columns, squeeze=False)
    for row, pixels, of_image, title in zip(rows, images, maps, titles):
        shown = pixels.transpose(1, 2, 0)
        row[0].imshow(shown[..., 0] if shown.shape[2] == 1 else shown, cmap="gray", vmin=0, vmax=1)
        row[0].set_title(shortened(title, 22), fontsize=7)
        for axes, (query, values) in zip(row[1:], of_image):
            height, width = len(values), len(values[0])
            axes.imshow(values, cmap="viridis", vmin=0)
            name = "all queries" if query is None else f"query {query[0]},{query[1]}"
            axes.set_title(f"{name}\nmaximum {np.max(values):.2f}", fontsize=7)
            if query is not None:
                x, y = ((i + 0.5) * n / cells - 0.5 for i, n, cells in zip(query[::-1], (width, height), grid[::-1]))
                axes.plot([x], [y], "x", color="black", markersize=9, markeredgewidth=4)
                axes.plot([x], [y], "x", color="white", markersize=8, markeredgewidth=1.8)
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
    return figure
