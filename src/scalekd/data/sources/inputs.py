"""The images that a trained model is used on: files, folders and other sources, one after the other."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from PIL import Image

from scalekd.common.errors import UserError, nearest
from scalekd.common.files import is_file
from scalekd.common.text import printable

from .names import KINDS, told
from .open import evaluated_part, open_unlabelled, parts_of
from .source import Source
from .table.text import is_table
from .unlabelled import Joined, Loose, WithoutLabels

KEY = "inputs"


def open_inputs(inputs: Sequence[str]) -> Source:
    """The images of all `inputs`, without labels. Each is an image file, a folder that is searched at any depth, or a
    source as `open_source` takes it. Raises `UserError`.
    """
    if not inputs:
        raise UserError(f"{KEY}: name an image, a folder or a source")
    opened: list[Source] = []
    for files, group in itertools.groupby(inputs, _is_image_file):  # a shell may give ten thousand files
        texts = list(group)
        opened += [_files(texts)] if files else map(_open, texts)
    return reduce(Joined, opened)


def _is_image_file(text: str) -> bool:
    return text.partition(":")[0] not in KINDS and not is_table(text) and is_file(Path(text).expanduser())


def _files(texts: list[str]) -> Loose:
    for text in texts:
        if Path(text).suffix in (".tar", ".tgz"):
            raise UserError(f"{KEY}: {text} is an archive; write tar:{text}, or wds:{text} for WebDataset shards")
    paths = [str(Path(text).expanduser()) for text in texts]
    return Loose(paths, paths)


def _open(text: str) -> Source:
    kind = text.partition(":")[0]
    if (kind in ("hf", "torchvision", "fashion-mnist") or is_table(text)) and len(parts_of(text)) > 1:
        raise UserError(f"{KEY}: {text} has several splits; name one of them, such as {evaluated_part(text)}")
    path = Path(text)
    if kind not in KINDS and ":" not in text and not is_table(text) and not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"{KEY}: there is no image or folder {text}.{printable(nearest(path.name, siblings)) if siblings else ''}"
        )
    return open_unlabelled(text, KEY)


def notes_on(source: Source, classes: Sequence[str]) -> list[str]:
    """What a person should know of the images before a model with these classes is used on them."""
    left = told(source.left_out).removeprefix("; ")
    return [note for note in (left, _labels_note(source, classes) if classes else "") if note]


def _labels_note(source: Source, classes: Sequence[str]) -> str:
    """A sentence if the labels or folders of the images name other classes than a model's; else "".

    Folders count as labels only if some of them are named as classes of the model.
    """
    named = _labels(source)
    known = named & set(classes)
    others = sorted(named - known)
    if not others or not (known or _has_labels(source)):
        return ""
    listed = ", ".join(printable(name) for name in others[:4]) + ", ..." * (len(others) > 4)
    kind = "labels" if _has_labels(source) else "folders"
    return (
        f"{kind} of the images that are no classes of the student: {listed} ({len(others)} of {len(named)}). It predicts "
        f"its own {len(classes)} classes only"
    )


def _parts(source: Source) -> Iterator[Any]:
    if isinstance(source, Joined):
        yield from _parts(source.labelled)
        yield from _parts(source.unlabelled)
    else:
        yield source


def _has_labels(source: Source) -> bool:
    return any(isinstance(part, WithoutLabels) for part in _parts(source))


def _labels(source: Source) -> set[str]:
    """The labels of labelled sources, and the upper folders of loose images, as in a folder of class folders."""
    found: set[str] = set()
    for part in _parts(source):
        if isinstance(part, WithoutLabels):
            found |= set(part.source.classes)
        elif isinstance(part, Loose):
            folders = {Path(name.split(" in ")[0]).parent for name in part.names}
            root = Path(os.path.commonpath(folders))
            found |= {folder.relative_to(root).parts[0] for folder in folders if folder != root}
    return found


class Numbered(WithoutLabels):
    """A source whose images have their numbers as targets, so that a batch says which images it holds."""

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.source[i][0], i
