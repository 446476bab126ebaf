"""Copies the training images of the second laboratory to larger JPEG files, for the ladder decoders.yaml.

    python lab/colour/jpegs.py runs/colour/data/train.tar runs/colour/data/train-jpeg.tar

A side of 256 pixels is more than twice that of most crops at 56 pixels, so `data.decoder: simplejpeg` decodes them at a
smaller scale.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path

from PIL import Image

SIDE = 256


def main(source: str, target: str) -> None:
    unfinished = Path(target).with_suffix(".part")
    with tarfile.open(source) as images, tarfile.open(unfinished, "w") as jpegs:
        for member in images:
            file = images.extractfile(member)
            if file is None:  # a folder
                continue
            data = jpeg(file.read())
            copy = tarfile.TarInfo(str(Path(member.name).with_suffix(".jpg")))
            copy.size = len(data)
            jpegs.addfile(copy, io.BytesIO(data))
    os.replace(unfinished, target)


def jpeg(image: bytes) -> bytes:
    """An encoded image, enlarged, as JPEG."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(image)) as small:
        small.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    main(*sys.argv[1:])
