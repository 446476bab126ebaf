"""Reads and checks COCO's instance annotations. docs/how-to/transfer.md lists all problems.

Entries that cannot be used are skipped and counted in `Coco.problems`. Only a file without a usable meaning raises
`UserError`. `data.py` makes batches of the result.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalekd.common.errors import UserError, first_line, nearest
from scalekd.common.text import counted, printable, shortened
from scalekd.data.images import BadImage, decode_size, is_image, read_file

from .box_checks import CONTRADICTING, refuse_fractions, refuse_many_contradictions, refuse_many_dropped
from .instances import FARTHEST, Picture, Problems, add_instances, is_whole, note, shown
from .masks import mask_tools

MISSING_ALLOWED = 0.05  # share of images that may have no file; more means a wrong folder


@dataclass
class Coco:
    """Checked annotations. Classes have the labels 1, 2, ... in the order of category ids; 0 is the background."""

    classes: list[str]
    category_ids: list[int]  # of each class, as in the file
    pictures: list[Picture]  # in the order of the file
    problems: Problems

    def with_objects(self) -> list[int]:
        """Indices of the `pictures` to train on: those with an object that is not a crowd."""
        return [i for i, picture in enumerate(self.pictures) if any(not x.crowd for x in picture.instances)]

    def summary(self) -> list[str]:
        """A line with counts, and one line for each kind of problem."""
        instances = [instance for picture in self.pictures for instance in picture.instances]
        crowds = sum(instance.crowd for instance in instances)
        unused = len(self.classes) - len({instance.label for instance in instances if not instance.crowd})
        parts = [
            counted(len(self.pictures), "image"),
            f"{len(self.pictures) - len(self.with_objects())} of them without objects",
            counted(len(instances) - crowds, "object"),
            f"{len(self.classes)} classes" + (f", {unused} of them without objects" if unused else ""),
            counted(crowds, "crowd region"),
        ]
        lines = ["; ".join(parts)]
        for kind, wheres in self.problems.items():
            first = ", ".join(shortened(where, 60) for where in dict.fromkeys(wheres[:3]))
            lines.append(f"{kind}: {len(wheres)} ({first}{', ...' if len(wheres) > 3 else ''})")
        return lines


def open_coco(annotations: Path, images: Path, key: str, classes: list[str] | None = None, masks: bool = True) -> Coco:
    """Reads an instances file and looks for its images in a folder.

    Args:
        annotations: a JSON file with `images`, `annotations` and `categories` (cocodataset.org, "format data").
        images: the folder that its file names are relative to.
        key: name of the file's recipe key or parameter, for messages.
        classes: for an evaluation set, those of the training set, which it must have too.
        masks: whether objects need a mask; if not, a box is enough.

    Raises:
        UserError: if the file has another format, an id has two meanings, more than a twentieth of the images are
            missing, no object is left, the classes differ, or the extra is missing.
    """
    mask_tools()  # raises here rather than in a worker process
    data = _read(annotations, key, masks)
    problems: Problems = {}
    categories = _categories(data["categories"], key, problems)
    pictures = _pictures(data["images"], images, key, problems)
    labels = {id: label for label, id in enumerate(categories, 1)}
    present = _with_files(pictures, images, key, problems)
    refuse_fractions(data["annotations"], f"{key}: {annotations}")
    add_instances(data["annotations"], pictures, labels, problems, masks)
    refuse_many_contradictions(data["annotations"], len(problems.get(CONTRADICTING, ())), f"{key}: {annotations}")
    coco = Coco(list(categories.values()), list(categories), present, problems)
    if classes is not None and coco.classes != classes:
        odd = sorted(set(classes) ^ set(coco.classes))
        raise UserError(
            f"{key}: {annotations} has other classes than the training set; only in one of them: "
            f"{printable(', '.join(odd[:5])) or 'none, but the order differs'}. Use the same categories in both."
        )
    if not coco.with_objects():
        problems_found = "".join(f"\n{line}" for line in coco.summary()[1:6])
        raise UserError(f"{key}: {annotations} has no usable object.{problems_found}")
    refuse_many_dropped(len(data["annotations"]), problems, f"{key}: {annotations}")
    return coco


# ---------------------------------------------------------------- the file


def _read(path: Path, key: str, masks: bool) -> dict[str, Any]:
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir() if p.suffix == ".json"] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) if siblings else ""
        raise UserError(f"{key}: no file {path}.{printable(hint)}")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{key}: {path} cannot be read as JSON: {first_line(error)}") from None
    if isinstance(data, list) and data and isinstance(data[0], dict) and "score" in data[0]:
        raise UserError(f"{key}: {path} contains results (predictions with scores), not annotations")
    parts = ("images", "annotations", "categories")
    missing = [part for part in parts if not isinstance(data, dict) or not isinstance(data.get(part), list)]
    if missing:
        raise UserError(
            f"{key}: {path} is not in COCO's format: it has no list of {' or '.join(missing)}. Use instance "
            "annotations, such as instances_train2017.json."
        )
    entries = data["annotations"]
    if entries and not any(isinstance(entry, dict) and "bbox" in entry for entry in entries):
        raise UserError(f"{key}: no annotation in {path} has a bbox. Use instance annotations, not captions.")
    if masks and entries and not any(isinstance(entry, dict) and entry.get("segmentation") for entry in entries):
        raise UserError(
            f"{key}: no annotation in {path} has a segmentation. Mask R-CNN needs masks; detector.kind=retinanet does not."
        )
    return data


def _categories(entries: list[Any], key: str, problems: Problems) -> dict[int, str]:
    """Names by id, in the order of ids."""
    names: dict[int, str] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not is_whole(entry.get("id")) or not isinstance(entry.get("name"), str):
            raise UserError(
                f"{key}: a category needs a whole number as id, and a name; this entry lacks one: {shown(entry)}"
            )
        id, name = entry["id"], entry["name"]
        if names.setdefault(id, name) != name:
            raise UserError(
                f"{key}: category id {id} is used for {printable(names[id])!r} and {printable(name)!r}; use two ids"
            )
    twice = [name for name, times in Counter(names.values()).items() if times > 1]
    if twice:
        ids = [id for id, name in names.items() if name == twice[0]]
        raise UserError(f"{key}: two categories are called {printable(twice[0])!r}: ids {ids}; use two names")
    repeated = len(entries) - len(names)
    if repeated:
        problems["duplicate categories, counted once"] = ["categories"] * repeated
    return dict(sorted(names.items()))


def _pictures(entries: list[Any], folder: Path, key: str, problems: Problems) -> dict[Hashable, Picture]:
    pictures: dict[Hashable, Picture] = {}
    for entry in entries:
        usable = isinstance(entry, dict) and isinstance(entry.get("id"), (int, str))
        if not usable or not isinstance(entry.get("file_name"), str):
            note(problems, "image entries without id or file_name, skipped", shown(entry))
            continue
        path = os.path.join(folder, entry["file_name"])
        height, width = entry.get("height"), entry.get("width")
        if not (is_whole(height) and is_whole(width) and 0 < height < FARTHEST and 0 < width < FARTHEST):
            height = width = 0  # read from the file later
        picture = Picture(entry["id"], path, height, width)
        before = pictures.setdefault(picture.id, picture)
        if before.path != path:
            raise UserError(
                f"{key}: image id {shortened(str(picture.id), 40)} is used for "
                f"{printable(os.path.basename(before.path))} and {printable(os.path.basename(path))}; use two ids"
            )
        if before is not picture:
            note(problems, "duplicate images, counted once", entry["file_name"])
    return pictures


def _with_files(pictures: dict[Hashable, Picture], folder: Path, key: str, problems: Problems) -> list[Picture]:
    """The pictures with a file and a size. Raises `UserError` if too many files are missing."""
    missing = [p for p in pictures.values() if not os.path.isfile(p.path)]
    if len(missing) > max(1, MISSING_ALLOWED * len(pictures)) or len(missing) == len(pictures) > 0:
        first = os.path.relpath(missing[0].path, folder)
        raise UserError(
            f"{key}: {len(missing)} of {len(pictures)} images are not in {folder}; the first: {printable(first)}."
            + _hint_for_folder(folder, first)
        )
    gone = {id(p) for p in missing}
    for p in missing:
        note(problems, "images without a file, skipped", os.path.basename(p.path))
    present = [p for p in pictures.values() if id(p) not in gone]
    for p in present:
        if not p.height:
            _read_size(p, problems)
    return [p for p in present if p.height]


def _read_size(picture: Picture, problems: Problems) -> None:
    try:
        picture.width, picture.height = decode_size(read_file(picture.path))
    except BadImage:
        note(
            problems,
            "images without width and height whose file cannot be read, skipped",
            os.path.basename(picture.path),
        )


def _hint_for_folder(folder: Path, name: str) -> str:
    """Where a missing image may be."""
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        return f" The folder does not exist.{printable(nearest(folder.name, siblings)) if siblings else ''}"
    base = os.path.basename(name)
    below = [sub.name for sub in sorted(folder.iterdir()) if (sub / base).is_file()]
    if below:
        return f" It is in {folder / printable(below[0])}; use that folder."
    names = [p for p, _ in zip((e.name for e in os.scandir(folder) if is_image(e.name)), range(2000))]
    return printable(nearest(base, names)) if names else f" {folder} contains no images."
