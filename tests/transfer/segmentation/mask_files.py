"""Small images with masks, for the tests of segmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from scalekd.transfer.segmentation.pairs import Pairs, open_pairs

NAMES = ["wall", "floor", "sky"]


def write_pairs(root: Path, count: int = 4, values: tuple[int, ...] = (0, 1, 2), size: tuple[int, int] = (20, 30)):
    """images/ and masks/: pixel and class of a place belong together, the grey level is 50 times the class."""
    random = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        mask = random.choice(values, size).astype(np.uint8)
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
        Image.fromarray(np.repeat(50 * mask[:, :, None], 3, 2)).save(root / "images" / f"{i}.png")
    (root / "classes.txt").write_text("".join(f"{n}\n" for n in NAMES))


def opened(folder: Path) -> Pairs:
    return open_pairs(folder / "images", folder / "masks", NAMES)


def save_mask(folder: Path, values: np.ndarray, name: str = "1.png", **options: object) -> Pairs:
    """The pairs of `folder` with another mask in the place of its second."""
    pairs = opened(folder)
    Image.fromarray(values, **options).save(folder / "masks" / name)
    return pairs
