"""Small images for tests."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {
    "ant": (200, 60, 60),
    "bee": (60, 200, 60),
    "cat": (60, 60, 200),
}  # class: its colour, to which noise is added


@functools.cache
def _encoded(per_class: int, size: int, seed: int) -> dict[str, bytes]:
    """The files by name. Most tests begin with the same ones, and encoding takes much longer than writing."""
    random, files = np.random.default_rng(seed), {}
    for name, colour in COLOURS.items():
        for i in range(per_class):
            noise = random.integers(-50, 50, (size, size, 3))
            file = io.BytesIO()
            Image.fromarray((np.array(colour) + noise).astype(np.uint8)).save(file, "png")
            files[f"{name}/{i}.png"] = file.getvalue()
    return files


def write_images(folder: Path, per_class: int, size: int = 40, seed: int = 0) -> None:
    """Writes `folder/CLASS/0.png` and so on: three classes that differ in colour."""
    for name in COLOURS:
        (folder / name).mkdir(parents=True)
    for name, content in _encoded(per_class, size, seed).items():
        (folder / name).write_bytes(content)
