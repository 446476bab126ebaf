"""Makes src/scalekd/demo/data from the full Fashion-MNIST: all test images and 10,000 training images.

    python tools/embed_demo_data.py /usr/share/datasets/fashion-mnist

The training part has 1,000 images of each class, chosen by a fixed seed, in their original order.
"""

from __future__ import annotations

import gzip
import shutil
import sys
from pathlib import Path

import numpy as np

from scalekd.data.sources.open import open_source

TARGET = Path(__file__).parent.parent / "src" / "scalekd" / "demo" / "data"
PER_CLASS = 1000


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    # no file name or time in the header, so that equal images give equal bytes
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write(header + array.tobytes())


def main(whole: str) -> None:
    TARGET.mkdir(parents=True, exist_ok=True)
    source = open_source(f"idx:{whole}/train", "train")
    targets = np.array(source.targets)
    random = np.random.default_rng(0)
    chosen = np.sort(np.concatenate([random.permutation(np.flatnonzero(targets == c))[:PER_CLASS] for c in range(10)]))
    write_idx(TARGET / "train-images-idx3-ubyte.gz", np.stack([np.asarray(source[i][0]) for i in chosen]))
    write_idx(TARGET / "train-labels-idx1-ubyte.gz", targets[chosen].astype(np.uint8))
    for kind in ("images-idx3", "labels-idx1"):
        shutil.copy(f"{whole}/t10k-{kind}-ubyte.gz", TARGET / f"test-{kind}-ubyte.gz")


if __name__ == "__main__":
    main(sys.argv[1])
