"""Drawn photos for the benchmarks of loading: noise of several sizes, as JPEG files."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# name: width, height, and how much coarse noise weighs more than fine; less makes larger files
KINDS: dict[str, tuple[int, int, float]] = {
    "500x375, smooth": (500, 375, 0.5),
    "500x375": (500, 375, 0.1),
    "500x375, noisy": (500, 375, -0.2),
    "2000x1500, smooth": (2000, 1500, 0.5),
}


def photo(kind: str, number: int) -> bytes:
    """Photo `number` of a kind, as JPEG of quality 90 with half as many pixels of colour in each direction."""
    width, height, smoothness = KINDS[kind]
    random = np.random.default_rng(number)
    pixels: NDArray[np.float64] = np.zeros((height, width, 3))
    for size in (1, 2, 4, 8, 16, 64, 128, 250):
        noise = random.integers(0, 255, (height // size + 2, width // size + 2, 3), dtype=np.uint8)
        pixels += size**smoothness * np.asarray(
            Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        )
    pixels -= pixels.min()
    file = io.BytesIO()
    Image.fromarray((pixels * (255 / pixels.max())).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
