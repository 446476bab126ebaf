"""Small images for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {
    "ant": (200, 60, 60),
    "bee": (60, 200, 60),
    "cat": (60, 60, 200),
}  # class: its colour, to which noise is added


def write_images(folder: Path, per_class: int, size: int = 40, seed: int = 0) -> None:
    """Writes `folder/CLASS/0.png` and so on: three classes that differ in colour."""
    random = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            noise = random.integers(-50, 50, (size, size, 3))
            Image.fromarray((np.array(colour) + noise).astype(np.uint8)).save(folder / name / f"{i}.png")
