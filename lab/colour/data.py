"""Makes the second laboratory's images: colour icons of 120 things on random backgrounds, in three archives.

    python lab/colour/data.py runs/colour/packages runs/colour/data

fetches the icon sets of sets.yaml into the first folder and writes train.tar, search.tar and test.tar into the second.
A class is a thing that all sets draw (classes.txt). The parts have different sets, by different artists:

    train    9,600 images, 80 of each class, from five sets: for students and the teacher's classifier
    search   2,400 images, 20 of each class, from another set: for choosing options; no student is trained on them
    test     4,800 images, 40 of each class, from three other sets: for the reported figures

data.sha256 has a checksum of the pixels of each part, so that other versions of Pillow may compress them differently.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from icons import HERE, class_names, draw, fetch, listed
from PIL import Image
from scenes import scene

COUNTS = {"train": 80, "search": 20, "test": 40}  # images of each class

Icons = dict[str, list[Image.Image]]
"""Class -> its icons, one from each set of the part."""


def main(packages: str, target: str) -> None:
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    wrong = []
    for part, expected in expected_sums().items():
        found = write(folder / f"{part}.tar", images(part, drawn(part, Path(packages))))
        if found != expected:
            wrong.append(f"{part}: {found}, in lab/colour/data.sha256 {expected}")
    if wrong:
        raise SystemExit("these images are not those of the reported figures:\n" + "\n".join(wrong))


def expected_sums() -> dict[str, str]:
    """Part -> the checksum of its pixels."""
    lines = (line.split() for line in (HERE / "data.sha256").read_text().splitlines())
    return {part: checksum for checksum, part in lines}


def drawn(part: str, packages: Path) -> Icons:
    sets = [fetch(name, packages) for name, about in listed().items() if about.part == part]
    return {name: [draw(icons, name) for icons in sets] for name in class_names()}


def images(part: str, icons: Icons) -> Iterator[tuple[str, Image.Image]]:
    """Name in the archive and pixels of every image of a part. An image follows from part, class and number alone."""
    for place, (name, of_class) in enumerate(icons.items()):
        for number in range(COUNTS[part]):
            random = np.random.default_rng([list(COUNTS).index(part), place, number])
            yield f"{name}/{number:03}.png", scene(of_class[number % len(of_class)], random)


def write(archive: Path, made: Iterable[tuple[str, Image.Image]]) -> str:
    """Writes an archive with class folders; it appears when it is complete. Returns the checksum of names and pixels."""
    checksum = hashlib.sha256()
    unfinished = archive.with_suffix(".part")
    with tarfile.open(unfinished, "w") as tar:
        for name, image in made:
            checksum.update(name.encode() + image.tobytes())
            png = io.BytesIO()
            image.save(png, "PNG")
            member = tarfile.TarInfo(name)
            member.size = png.tell()
            png.seek(0)
            tar.addfile(member, png)
    os.replace(unfinished, archive)
    return checksum.hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
