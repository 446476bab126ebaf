"""Small images with sets of labels for tests: squares of one colour for each class, and tables that name them; mAP, slowly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from small_images import COLOURS


def write_sets(folder: Path, images: int = 32, size: int = 40, seed: int = 0) -> list[tuple[str, ...]]:
    """Writes 0.png, 1.png, ... and labels.csv, whose labels are joined by `|`; returns the labels.

    Class `ant` is in half of the images, `bee` in a third, `cat` in a sixth; every image has a label.
    """
    folder.mkdir(parents=True)
    random, rows = np.random.default_rng(seed), []
    for i in range(images):
        labels = [name for name, share in zip(COLOURS, (2, 3, 6)) if i % share == 0] or ["ant"]
        picture = random.integers(0, 255, (size, size, 3))
        for name in labels:
            y, x = random.integers(0, size - 12, 2)
            picture[y : y + 12, x : x + 12] = COLOURS[name]
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i}.png")
        rows.append(tuple(labels))
    lines = [f"{i}.png,{'|'.join(labels)}" for i, labels in enumerate(rows)]
    (folder / "labels.csv").write_text("\n".join(["path,labels", *lines]) + "\n")
    return rows


def slow_average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """The area under the curve of precision over recall as steps, from its points at every threshold."""
    area = recall = 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        found = scores >= threshold
        hits = (found & truth).sum()
        area += (hits / truth.sum() - recall) * hits / found.sum()
        recall = hits / truth.sum()
    return area


def slow_map(scores: np.ndarray, truth: np.ndarray) -> float:
    """The mean of `slow_average_precision` over the classes that an image has, in %. scores, truth: (N, C)."""
    classes = [c for c in range(truth.shape[1]) if truth[:, c].any()]
    return 100 * float(np.mean([slow_average_precision(scores[:, c], truth[:, c]) for c in classes]))
