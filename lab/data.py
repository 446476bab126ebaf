"""Makes the laboratory's images from Fashion-MNIST: two items on one canvas, 100 classes.

    python lab/data.py /usr/share/datasets/fashion-mnist runs/lab/data

A canvas is 40x40 pixels with two items of 24x24 pixels, one at the upper left and one at the lower right, each moved by
up to 5 pixels and mirrored at random. Where they overlap, the brighter pixel is visible. The class is 10 * upper left +
lower right. With ten classes, features tell little more than logits; a hundred classes that share parts leave more.

No item is used for two purposes:

    teach    150,000 canvases of the training items 10,000 to 59,999: for training teachers
    search     4,000 canvases of the same items: for choosing options; no student is trained on them
    train      8,000 canvases of the training items 0 to 9,999: for training students
    probe      4,000 and 4,000 single items (10 classes) of the test set: for linear probes of the features
    test       5,000 canvases of the test items: for the reported figures
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from scalekd.data.sources.open import open_source

CANVAS, ITEM, SHIFT = 40, 24, 5
PARTS = {  # name: (file, first item, last item, canvases)
    "teach": ("train", 10_000, 60_000, 150_000),
    "search": ("train", 10_000, 60_000, 4_000),
    "train": ("train", 0, 10_000, 8_000),
    "test": ("t10k", 0, 10_000, 5_000),
}


def main(fashion: str, target: str) -> None:
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    items = {name: _items(f"idx:{fashion}/{name}") for name in ("train", "t10k")}
    for number, (name, (file, first, last, count)) in enumerate(PARTS.items()):
        images, labels = items[file]
        random = np.random.default_rng(number)
        _write(folder / name, *canvases(images[first:last], labels[first:last], count, random))
    images, labels = items["t10k"]
    random = np.random.default_rng(len(PARTS))
    for name, first in (("probe-train", 0), ("probe-test", 4_000)):
        alone = [
            _place(np.zeros((CANVAS, CANVAS), np.uint8), image, random, 0, CANVAS - ITEM)
            for image in images[first : first + 4_000]
        ]
        _write(folder / name, np.stack(alone), labels[first : first + 4_000])


def canvases(
    images: np.ndarray, labels: np.ndarray, count: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """images (N, 24, 24), labels (N,) of 10 classes -> (count, 40, 40) and (count,) of 100 equally frequent classes."""
    of_class = [np.flatnonzero(labels == c) for c in range(10)]
    classes = random.permutation(np.arange(count) % 100)
    made = np.zeros((count, CANVAS, CANVAS), np.uint8)
    for canvas, both in zip(made, classes):
        upper, lower = divmod(int(both), 10)
        _place(canvas, images[random.choice(of_class[upper])], random, 0, SHIFT)
        _place(canvas, images[random.choice(of_class[lower])], random, CANVAS - ITEM - SHIFT, CANVAS - ITEM)
    return made, classes


def _place(canvas: np.ndarray, item: np.ndarray, random: np.random.Generator, low: int, high: int) -> np.ndarray:
    y, x = random.integers(low, high + 1, size=2)
    region = canvas[y : y + ITEM, x : x + ITEM]
    np.maximum(region, item[:, ::-1] if random.random() < 0.5 else item, out=region)
    return canvas


def _items(source_text: str) -> tuple[np.ndarray, np.ndarray]:
    source = open_source(source_text, "items")
    small = [source[i][0].resize((ITEM, ITEM), Image.Resampling.LANCZOS) for i in range(len(source))]
    return np.stack([np.asarray(image) for image in small]), np.array(source.targets)


def _write(prefix: Path, images: np.ndarray, labels: np.ndarray) -> None:
    for kind, array in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        Path(f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
