"""Invalid and malicious files for tests."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path


def contents(folder: Path) -> dict[str, str]:
    """The checksum of every file in a folder, at any depth; folders are listed too."""
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in folder.rglob("*")}


def write_idx(prefix: Path, images: int, labels: int, cut: int = 0) -> None:
    """A pair of IDX files; `cut` bytes are missing at the end of the images."""
    data = (
        bytes([0, 0, 8, 3])
        + b"".join(n.to_bytes(4, "big") for n in (images, 4, 4))
        + b"".join(bytes([i]) * 16 for i in range(images))
    )
    Path(f"{prefix}-images-idx3-ubyte").write_bytes(data[: len(data) - cut])
    data = bytes([0, 0, 8, 1]) + labels.to_bytes(4, "big") + bytes(i % 3 for i in range(labels))
    Path(f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(data))


class Payload:
    """Creates the file `trace` when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)
