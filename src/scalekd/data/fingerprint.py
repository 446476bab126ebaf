"""A fingerprint of a run's images, to notice other data when the run is resumed.

It covers all names, labels and classes, the sizes of up to `SIZES` files, and the contents of all files if they have
at most `BYTES` together, else of `SAMPLE` files. Sizes need a look at each file (about 20 s for a million files on a
network file system that answers 50,000 a second), so with more files every n-th one is looked at. Four bytes for each of
them tell which files changed.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from scalekd.common.text import printable

from .images import BadImage, read_file
from .sources.tars import Place

SIZES = 50_000
BYTES = 64 * 2**20
SAMPLE = 64

DIGEST = 4  # bytes for each file
UNREADABLE = bytes(DIGEST)

Fingerprint = dict[str, Any]  # images, classes, names, labels, sizes, contents, files: plain values


class Listing(NamedTuple):
    """What the images of a run are, in the order of its indices."""

    classes: Sequence[str]
    labels: Sequence[object]  # of each image
    names: Sequence[str]  # of each file
    places: Sequence[str | Place | None]  # files, or positions in archives; None if the image is neither
    pixels: Callable[[int], bytes] | None = None  # of an image that is neither; may raise `BadImage`
    called: Callable[[int], str] | None = (
        None  # the name in messages of the image of file i; by default that of the file
    )

    def name(self, i: int) -> str:
        return printable(self.called(i) if self.called else self.names[i])


def fingerprint(listing: Listing) -> Fingerprint:
    """Plain values, equal for equal images. A file that cannot be read counts as unreadable."""
    places = listing.places
    some = _looked_at(len(places))
    sizes = [_size(places[i]) for i in some]
    whole = len(some) == len(places) and None not in sizes and sum(size or 0 for size in sizes) <= BYTES
    sample = some if whole else range(0, len(places), max(1, len(places) // SAMPLE))
    digests: dict[int, bytes] = {}

    def contents() -> Iterator[bytes]:
        for i in sample:
            content = _content(listing, i)
            digests[i] = UNREADABLE if content is None else hashlib.sha256(content).digest()
            yield b"unreadable" if content is None else content

    summed = _sum(contents())
    return {
        "images": len(listing.labels),
        "classes": list(listing.classes),
        "names": _sum(name.encode("utf-8", "surrogateescape") for name in listing.names),
        "labels": _sum(str(label).encode() for label in listing.labels),
        "sizes": _sum(str(size).encode() for size in sizes),
        "contents": summed,
        "files": base64.b64encode(b"".join(_file(size, digests.get(i)) for i, size in zip(some, sizes))).decode(),
    }


def _looked_at(files: int) -> range:
    """The files whose sizes are looked at."""
    return range(0, files, max(1, files // SIZES))


def changed(before: Fingerprint, now: Fingerprint, listing: Listing) -> dict[int, bool] | None:
    """The files of `listing`, that of now, that differ, and whether each could be opened before.

    None if the fingerprints differ in more than that, or if one does not tell.
    """
    if any(before.get(key) != now[key] for key in ("images", "classes", "names", "labels")):
        return None
    some = _looked_at(len(listing.places))
    old, new = _files(before), _files(now)
    if not len(old) == len(new) == len(some):
        return None
    return {i: a != UNREADABLE for i, a, b in zip(some, old, new) if a != b}


def _files(known: Fingerprint) -> list[bytes]:
    try:
        joined = base64.b64decode(known.get("files") or "", validate=True)
    except (TypeError, ValueError):
        return []
    return [joined[i : i + DIGEST] for i in range(0, len(joined), DIGEST)]


def _file(size: int | None, digest: bytes | None) -> bytes:
    if size in (-1, 0) or digest == UNREADABLE:  # an empty file is no image
        return UNREADABLE
    return hashlib.sha256(str(size).encode() + (digest or b"")).digest()[:DIGEST]


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """What differs between two fingerprints, in words; the first two differences say the most."""
    old, new = before.get("classes"), now["classes"]
    old = old if isinstance(old, list) else []
    if before.get("images") != now["images"]:
        return [f"{now['images']} images, {before.get('images')} before"]
    if old != new:
        first = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
        names = (f"`{names[first]}`" if first < len(names) else "missing" for names in (new, old))
        return ["class {} is {}, {} before".format(first, *names)]
    words = {"names": "other file names", "labels": "other labels", "sizes": "files of other sizes"}
    found = [text for key, text in words.items() if before.get(key) != now[key]]
    return found or (["files with other contents"] if before.get("contents") != now["contents"] else [])


def _size(place: str | Place | None) -> int | None:
    """Bytes of an encoded image, -1 if there is no such file; None if the image is no file."""
    if not isinstance(place, str):
        return place.size if place else None
    try:
        return os.stat(place).st_size
    except OSError:
        return -1


def _content(listing: Listing, i: int) -> bytes | None:
    """None if it cannot be read."""
    place = listing.places[i]
    try:
        if place is None:
            return listing.pixels(i) if listing.pixels else b""
        return read_file(place) if isinstance(place, str) else place.read()
    except BadImage:
        return None


def _sum(parts: Iterable[bytes]) -> str:
    summed = hashlib.sha256()
    for part in parts:
        summed.update(len(part).to_bytes(8, "little"))
        summed.update(part)
    return summed.hexdigest()
