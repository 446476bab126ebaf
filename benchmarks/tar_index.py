"""Measures how long it takes to open a tar file with many members and to read one of its images.

python benchmarks/tar_index.py --members 100000 > docs/results/tar-index.json
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import random
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from scalekd.common.provenance import machine
from scalekd.data.sources.open import open_source

CLASSES = 100


def write(path: Path, members: int) -> None:
    """Class folders of small PNGs, all with the same content."""
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(content, "PNG")
    with tarfile.open(path, "w") as tar:
        for i in range(members):
            info = tarfile.TarInfo(f"photos/class{i % CLASSES:03}/{i:07}.png")
            info.size = len(content.getvalue())
            content.seek(0)
            tar.addfile(info, content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=100_000)
    parser.add_argument("--reads", type=int, default=2000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photos.tar"
        write(path, args.members)
        opened = []
        for _ in range(3):
            began = time.perf_counter()
            source = open_source(f"tar:{path}", "--data")
            opened.append(time.perf_counter() - began)
        chosen = random.Random(0).sample(range(len(source)), args.reads)
        began = time.perf_counter()
        for i in chosen:
            source[i]
        read = time.perf_counter() - began
        result = {
            "command": f"python benchmarks/tar_index.py --members {args.members}",
            "machine": machine(torch.device("cpu")),
            "python": platform.python_version(),
            "members": len(source),
            "archive_mb": round(path.stat().st_size / 1e6, 1),
            "open_seconds": [round(s, 2) for s in opened],
            "read_and_decode_us_per_image": round(1e6 * read / args.reads, 1),
            "note": "the archive is in the page cache; 32x32 PNGs",
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
