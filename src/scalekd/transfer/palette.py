"""Chooses a colour for each class."""

from __future__ import annotations

import functools
import itertools

import numpy as np

Colour = tuple[int, int, int]
# the colours of Okabe and Ito (Nature Methods 8, 441) without black: colour-blind readers can distinguish them
FIRST: list[Colour] = [
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
]


@functools.cache
def palette(classes: int) -> list[Colour]:
    """A colour for each of at most 255 classes: first those of `FIRST`, then always the colour that is farthest from
    all before it, so a class keeps its colour if classes are added. No greys: images are shown in grey."""
    levels = range(0, 256, 30)
    free = np.array([c for c in itertools.product(levels, repeat=3) if max(c) - min(c) > 60 and max(c) > 120])
    colours = list(FIRST[:classes])
    nearest = np.linalg.norm(free[:, None] - np.array(FIRST), axis=2).min(1)
    while len(colours) < classes:
        new = free[int(nearest.argmax())]
        colours.append((int(new[0]), int(new[1]), int(new[2])))
        nearest = np.minimum(nearest, np.linalg.norm(free - new, axis=1))
    return colours
