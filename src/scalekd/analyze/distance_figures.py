"""The figures of `scalekd analyze distance`. Each function returns a matplotlib figure."""

from __future__ import annotations

from typing import Any

import numpy as np

from .figures import COLOURS, MARKERS, figure_class, short


def draw_distances(found: dict[str, Any], common: str) -> Any:
    """A histogram for each run and space, with its median and middle half. `common`, the space of all runs, is hatched."""
    figure_of, _ = figure_class()
    rows = [(run, space) for run in found["runs"] for space in run["spaces"]]
    rows.sort(key=lambda row: row[1] == common)  # own projectors above, the common space below
    figure = figure_of(figsize=(8.0, 1.2 + 0.7 * len(rows)), layout="constrained")
    axes = figure.subplots()
    values = [np.array(found["distances"][run["run"]][space]) for run, space in rows]
    edges = np.histogram_bin_edges(np.concatenate(values), bins=80)
    for i, ((run, space), v) in enumerate(zip(rows, values)):
        base = len(rows) - 1 - i
        counts = np.histogram(v, edges)[0]
        style = {"facecolor": "#d9d9d9", "hatch": "////"} if space == common else {"facecolor": "#9ecae1"}
        axes.stairs(base + 0.75 * counts / counts.max(), edges, baseline=base, fill=True, edgecolor="#444444", **style)
        s = run["spaces"][space]
        axes.plot([s["q25"], s["q75"]], [base, base], color="black", linewidth=4, solid_capstyle="butt")
        axes.plot([s["median"]] * 2, [base, base + 0.78], color="black", linewidth=1.5)
        axes.annotate(
            f"{s['median']:.3f}",
            (s["median"], base + 0.78),
            ha="center",
            va="bottom",
            fontsize=8,
            annotation_clip=False,
        )
    axes.set_yticks([len(rows) - 1 - i + 0.3 for i in range(len(rows))], [f"{short(r['run'])}\n{s}" for r, s in rows])
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.set_ylim(-0.15, len(rows) + 0.1)
    axes.set_xlabel("squared distance of alternative components, per image (0: the same, 2: unrelated)")
    axes.grid(True, axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.set_title("Line and number: median; bar: middle half of the images", fontsize=9)
    return figure


def draw_projection(found: dict[str, Any]) -> Any:
    """Differences between student and teacher on the left, features on the right."""
    figure_of, _ = figure_class()
    figure = figure_of(figsize=(11.0, 5.4), layout="constrained")
    p = found["projection"]
    titles = {"differences": "student minus teacher; +: zero distance", "features": "in the teacher's own plane"}
    for axes, (panel, title) in zip(figure.subplots(1, 2), titles.items()):
        share = p[panel]["share"]
        for i, (model, xy) in enumerate(p[panel]["points"].items()):
            style = i - (panel == "features")  # a run looks the same in both panels
            colour = "#000000" if model == "teacher" else COLOURS[style % 6]
            label = model if model == "teacher" else f"{short(model)}, {p['space'][model]}"
            marker = "x" if model == "teacher" else MARKERS[style % 8]
            face = {} if model == "teacher" else {"facecolors": colour if style % 2 else "none"}
            axes.scatter(*zip(*xy), s=14, marker=marker, color=colour, linewidths=0.7, alpha=0.8, label=label, **face)
        if panel == "differences":
            axes.plot([0], [0], "k+", markersize=14, markeredgewidth=2)
        axes.set(xlabel=f"PCA 1, {100 * share[0]:.0f} %", ylabel=f"PCA 2, {100 * share[1]:.0f} %", aspect="equal")
        axes.set_title(title, fontsize=10)
        axes.grid(True, color="#dddddd")
        axes.set_axisbelow(True)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), markerscale=2)
    return figure
