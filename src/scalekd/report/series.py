"""Numbers over a run, from the events of its log."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from .svg import Point, finite


def events_of(events: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Events of a kind by step. A resumed run repeats the steps after its checkpoint: the later events count."""
    kept: list[dict[str, Any]] = []
    for event in events:
        if event.get("event") == kind and finite(event.get("step")):
            while kept and kept[-1]["step"] >= event["step"]:
                kept.pop()
            kept.append(event)
    return kept


def figure_points(events: Iterable[dict[str, Any]], key: str) -> list[Point]:
    """(epoch, a figure in %) of every validation."""
    pairs = [(e.get("epoch"), e.get(key)) for e in events_of(events, "validation")]
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
    loop waits for data; where the two add up to more than 1 they are scaled down to it. A run without a
    teacher logs no share of one.
    """
    steps = time = data = teacher = before = 0.0
    for event in events_of(events, "step"):
        count, before = event["step"] - before, event["step"]
        speed, waiting, teaching = event.get("images_per_s"), event.get("data_share"), event.get("teacher_share", 0.0)
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
