"""Sections of the page on features and costs: frequencies, similarity of the stages, distances, cost of a step."""

from __future__ import annotations

from typing import Any

from scalekd.cost.page import COLUMNS, cost_lines, cost_rows

from .evaluate import Seen
from .page import NONE, panels, section, table
from .svg import BOTTOM, LEFT, RIGHT, TOP, Axis, Curve, chart, escape, legend, log_ticks, nice_ticks

LEAST_MAGNITUDE = 1e-4  # of the direct component, in the drawing


def feature_sections(seen: Seen) -> list[str]:
    return [_frequency(seen), _likeness(seen), _distances(seen)]


def _frequency(seen: Seen) -> str:
    if not seen.spectra:
        return ""
    curves, rows = [], []
    for i, (label, spectrum) in enumerate(seen.spectra.items()):
        profile, share = spectrum["radial"], spectrum["direct_share"]
        direct = profile[0]["magnitude"] or 1.0
        points = [(float(r["ring"]), max(r["magnitude"] / direct, LEAST_MAGNITUDE)) for r in profile]
        curves.append(Curve(points, label, i))
        grid = "x".join(map(str, spectrum["grid"]))
        rows.append([label, grid, f"{100 * share['mean']:.1f} ± {100 * share['std']:.1f}"])
    values = [y for c in curves for _, y in c.points]
    y = Axis(log_ticks(min(values), max(1.0, *values)), BOTTOM, TOP, log=True)
    x = Axis(nice_ticks(0, max(c.points[-1][0] for c in curves), least_step=1), LEFT, RIGHT)
    figure = chart(curves, x, y, "half waves over the map", "magnitude, direct component 1")
    note = (
        f"DCT of the last maps, {seen.map_images} images. The direct component is each channel's mean over positions. Its share of the energy "
        "is shown ± the standard deviation over images. ScaleKD assumes that this share is large in teachers; `scalekd docs analyze`."
    )
    head = ["model", "map", "direct component (% of the energy)"]
    content = panels([f"<figure>{figure}{legend(curves)}</figure>"]) + table(head, rows, "numbers")
    return section("Frequencies of the last maps", content, note)


def _likeness(seen: Seen) -> str:
    if not seen.cka:
        return ""
    rows = [
        [f"stage {s}", *(NONE if value is None else f"{value:.2f}" for value in row)]
        for s, row in enumerate(seen.cka, 1)
    ]
    head = ["student", *(f"teacher's {t}" for t in (1, 2, 3, 4))]
    note = f"Linear CKA on {seen.map_images} images. 1: equal up to rotation and scale, 0: unrelated."
    return section("Similarity of the stages", table(head, rows, "numbers"), note)


def _distances(seen: Seen) -> str:
    if not seen.distances:
        return ""
    rows = [[name, *(f"{d[key]:.3f}" for key in ("median", "q05", "q95"))] for name, d in seen.distances.items()]
    note = (
        "Squared distance of unit vectors between the projectors' outputs and the teacher's maps, both without direct component, averaged "
        "over positions. 0: the same directions, 2: unrelated, 4: opposite. Median, 5 % and 95 % quantile over images."
    )
    return section(
        "Distance of the projectors' outputs from the teacher",
        table(["projector", "median", "5 %", "95 %"], rows, "numbers"),
        note,
    )


def cost_section(cost: dict[str, Any] | None) -> str:
    """cost: the result of `scalekd cost`."""
    if cost is None:
        return ""
    notes = "".join(f"<li>{escape(line)}</li>" for line in cost_lines(cost))
    note = "Counted, not measured. GMACs and saved activations are per image (`scalekd docs cost`)."
    return section(
        "Cost of a step", table(COLUMNS, cost_rows(cost), "numbers") + f'<ul class="note">{notes}</ul>', note
    )


def parts_section(parts: list[dict[str, Any]]) -> str:
    """parts: the result of `count_parts`."""
    rows = [[p["part"], f"{p['params'] / 1e6:.2f}", NONE if p["gmacs"] is None else f"{p['gmacs']:.3g}"] for p in parts]
    note = "GMACs of the forward pass of one image. `scalekd report` counts the whole step by part, with backward pass and memory."
    return section("Size and cost", table(["part", "params (M)", "GMACs"], rows, "numbers"), note)
