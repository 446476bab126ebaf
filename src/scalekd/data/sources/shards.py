"""WebDataset shards: tar archives with `key.jpg` and `key.cls` for each image."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from scalekd.common.errors import UserError
from scalekd.common.text import printable, shortened
from scalekd.data.images import EXTENSIONS

from .archived import Archived
from .content import Place
from .names import LeftOut, is_hidden, leave_out, refuse_mixed, refuse_splits, told, words_of
from .tars import images_of, index

OTHER_FIELDS = "other fields of samples (the key ends at the first dot of a name)"
MAX_CLASSES = 1_000_000
MAX_LABEL = 1000  # bytes
MAX_SHARDS = 100_000
NUMBER = re.compile(r"-?[0-9]{1,12}")


class Shards(Archived):
    """The images of all shards, in the order of the shards. Labels are numbers from 0, or class names.

    An optional `classes.txt` next to the shards, with one name per line, gives the names and number of classes.
    """

    def __init__(self, text: str, key: str):
        paths = shard_paths(text, key)
        self.left_out: LeftOut = {}
        self.names: list[str] = []
        self.places: list[Place] = []
        labels: list[str] = []
        for path in paths:
            for name, place, label in _samples(path, key, self.left_out):
                self.names.append(name)
                self.places.append(place)
                labels.append(label)
        if not labels:
            raise UserError(f"{key}: {text} has no images{told(self.left_out)}")
        refuse_mixed({name.rpartition("/")[0] for name in self.names}, text, key)
        self.classes, number = _classes(paths[0].parent / "classes.txt", labels, key)
        wrong = next((i for i, label in enumerate(labels) if label not in number), None)
        if wrong is not None:
            raise UserError(
                f"{key}: label {printable(repr(labels[wrong]))} of {self.where(wrong)} is not one of the "
                f"{len(self.classes)} classes; use numbers from 0 in all shards, or names in all shards"
            )
        self.targets = [number[label] for label in labels]
        refuse_splits(self.classes, text, key)


def sample_images(names: Iterable[str], left_out: LeftOut) -> list[str]:
    """The files in a shard that are the image of a sample; `0.mask.png`, for example, is not. Counts the others.

    As WebDataset defines it, the key of a sample ends at the first dot of the file name, and the rest is the field.
    """
    images = []
    for name in images_of(names, left_out):
        if f".{_key_and_field(name)[1].lower()}" in EXTENSIONS:
            images.append(name)
        else:
            leave_out(left_out, OTHER_FIELDS, name)
    return images


def _key_and_field(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, field


def shard_paths(text: str, key: str) -> list[Path]:
    """The shards that a pattern with ranges and wildcards names. Raises `UserError` if any is missing."""
    pattern = str(Path(text).expanduser())
    paths = [path for p in _ranges(pattern, key) for path in (sorted(glob.glob(p)) if glob.has_magic(p) else [p])]
    if not paths:
        raise UserError(f"{key}: no file matches {text}")
    refuse_mixed((words_of(Path(path).stem) for path in paths), text, key)
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise UserError(f"{key}: {len(missing)} of {len(paths)} shards of {text} do not exist, such as {missing[0]}")
    return [Path(path) for path in paths]


def _ranges(pattern: str, key: str) -> list[str]:
    """Expands every range in a pattern: `a-{08..10}.tar` -> a-08.tar, a-09.tar, a-10.tar."""
    paths = [pattern]
    while match := re.search(r"\{([^{}]*)\}", paths[0]):
        ends = re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", match[1])
        if not ends or int(ends[1]) > int(ends[2]):
            raise UserError(
                f"{key}: {shortened(match[0])} in {shortened(pattern)} is not a range; write for example {{000..012}}"
            )
        numbers = range(int(ends[1]), int(ends[2]) + 1)
        if len(numbers) * len(paths) > MAX_SHARDS:
            raise UserError(f"{key}: {pattern} stands for more than {MAX_SHARDS:,} shards")
        width = len(ends[1])
        paths = [path.replace(match[0], str(n).zfill(width), 1) for path in paths for n in numbers]
    return paths


def _samples(path: Path, key: str, left_out: LeftOut) -> list[tuple[str, Place, str]]:
    """(name of the image, its position in the archive, its label) for every sample in a shard."""
    places, _ = index(path, key)
    labels = {_key_and_field(name)[0]: name for name in places if _is_label(name)}
    images: dict[str, str] = {}
    for name in sample_images((name for name in places if name not in labels.values()), left_out):
        sample = _key_and_field(name)[0]
        if sample in images:
            raise UserError(
                f"{key}: {printable(images[sample])} and {printable(name)} in {path} belong to one sample; keep one of them"
            )
        images[sample] = name
    _refuse_dotted_keys(places, path, key)
    odd = sorted(images.keys() ^ labels.keys())
    if odd:
        problem = "no label (.cls)" if odd[0] in images else "a label and no image"
        raise UserError(
            f"{key}: sample {printable(odd[0])} in {path} has {problem}; {len(odd)} samples in this shard are incomplete"
        )
    return [(name, places[name], _label(places[labels[sample]], sample, path, key)) for sample, name in images.items()]


def _is_label(name: str) -> bool:
    return _key_and_field(name)[1] == "cls" and not is_hidden(name)


def _refuse_dotted_keys(names: Iterable[str], path: Path, key: str) -> None:
    """Raises `UserError` if labels belong to keys with a dot in them, `a.1.cls`: their images would be lost."""
    dotted = [name for name in names if name.endswith(".cls") and not _is_label(name) and not is_hidden(name)]
    if dotted:
        sample, field = _key_and_field(dotted[0])
        raise UserError(
            f"{key}: the key of a sample ends at the first dot, so {printable(dotted[0])} in {path} is the field "
            f"`{printable(field)}` of sample {printable(sample)}, not a label; {len(dotted)} labels in this shard are such. "
            "Write the shards again with keys without dots"
        )


def _label(place: Place, sample: str, path: Path, key: str) -> str:
    """The label of a sample: a class name, or a number without leading zeros."""
    if place.size > MAX_LABEL:
        raise UserError(
            f"{key}: the label of {printable(sample)} in {path} has {place.size} bytes, too many for a class"
        )
    try:
        text = place.read().decode().strip()
    except UnicodeDecodeError:
        raise UserError(f"{key}: the label of {printable(sample)} in {path} is not text") from None
    return str(int(text)) if NUMBER.fullmatch(text) else text


def _classes(names: Path, labels: list[str], key: str) -> tuple[list[str], dict[str, int]]:
    """The class names, and the class index of each valid label.

    names: the path of `classes.txt`, which need not exist.
    """
    if names.is_file():
        try:
            lines = names.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{key}: {names} is not UTF-8 text; it must have one class per line") from None
        classes = [line.strip() for line in lines if line.strip()]
        if not classes or len(set(classes)) < len(classes):
            raise UserError(
                f"{key}: {names} has {'a name twice' if classes else 'no names'}; it must have one class per line"
            )
        return classes, _numbered(classes) | _numbered(map(str, range(len(classes))))
    numbers = {int(label) for label in labels if NUMBER.fullmatch(label)}
    if NUMBER.fullmatch(labels[0]):
        classes = [str(i) for i in range(min(max(numbers) + 1, MAX_CLASSES))]
    else:
        classes = sorted({label for label in labels if label and not NUMBER.fullmatch(label)})
    return classes, _numbered(classes)


def _numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)}
