"""COCO's instance annotations: read once, checked, and every problem told. docs/how-to/transfer.md has the table.

What cannot be used is left out and counted in `Coco.problems`; `UserError` only where nothing sensible is left. Items
to train and evaluate on are made of it in `detection_data.py`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from scalekd.common.errors import UserError, first_line, nearest
from scalekd.common.text import counted, printable, shortened
from scalekd.data.images import is_image

from .masks import mask_tools, rle_counts

SHORTEST = 0.1  # pixels: a box with a shorter side, once clipped to its image, is left out
FARTHEST = 1e5  # pixels: drawing a polygon takes memory by the length of its sides
MISSING_ALLOWED = 0.05  # of the images may have no file; more means a wrong folder


@dataclass(slots=True)
class Instance:
    label: int  # from 1: its place in `Coco.classes`, plus 1
    box: tuple[float, float, float, float]  # x, y, width, height in pixels, within the image
    mask: Any  # as in the file, and usable: a list of polygons, or RLE
    crowd: bool
    area: float | None  # in pixels, as in the file; None if it has none


@dataclass(slots=True)
class Picture:
    id: Hashable  # as in the file
    path: str
    height: int
    width: int
    instances: list[Instance] = field(default_factory=list)


@dataclass
class Coco:
    """Checked annotations. A class is seen as label 1, 2, ... in the order of category ids; 0 is the background."""

    classes: list[str]
    category_ids: list[int]  # as in the file, of each class
    pictures: list[Picture]  # in the order of the file
    problems: dict[str, list[str]]  # kind of problem: where it was met

    def with_objects(self) -> list[int]:
        """The places in `pictures` of those to train on: with an object that is no crowd."""
        return [i for i, picture in enumerate(self.pictures) if any(not x.crowd for x in picture.instances)]

    def told(self) -> list[str]:
        """A line on what there is, and one for each kind of problem."""
        every = [instance for picture in self.pictures for instance in picture.instances]
        crowds = sum(instance.crowd for instance in every)
        unused = len(self.classes) - len({instance.label for instance in every if not instance.crowd})
        parts = [
            counted(len(self.pictures), "image"),
            f"{len(self.pictures) - len(self.with_objects())} of them without objects",
            counted(len(every) - crowds, "object"),
            f"{len(self.classes)} classes" + (f", {unused} of them without objects" if unused else ""),
            counted(crowds, "crowd region"),
        ]
        lines = ["; ".join(parts)]
        for kind, places in self.problems.items():
            first = ", ".join(shortened(place, 60) for place in dict.fromkeys(places[:3]))
            lines.append(f"{kind}: {len(places)} ({first}{', ...' if len(places) > 3 else ''})")
        return lines


def open_coco(annotations: Path, images: Path, key: str, classes: list[str] | None = None) -> Coco:
    """Reads an instances file and looks for its images in a folder.

    annotations: a JSON file with `images`, `annotations` and `categories` (cocodataset.org, "format data").
    key: what messages call it. classes: those of the training set, for an evaluation set; the same are needed.
    Raises `UserError` for what is no such file, for ids that mean two things, for missing images (more than a
    twentieth), where no object is left, and without the extra.
    """
    mask_tools()  # told here, and not from a worker process
    data = _read(annotations, key)
    problems: dict[str, list[str]] = {}
    categories = _categories(data["categories"], key, problems)
    pictures = _pictures(data["images"], images, key, problems)
    labels = {id: label for label, id in enumerate(categories, 1)}
    present = _with_files(pictures, images, key, problems)
    _add_instances(data["annotations"], pictures, labels, problems)
    coco = Coco(list(categories.values()), list(categories), present, problems)
    if classes is not None and coco.classes != classes:
        odd = sorted(set(classes) ^ set(coco.classes))
        raise UserError(
            f"{key}: {annotations} has other classes than the training set; not in both: "
            f"{printable(', '.join(odd[:5])) or 'none, but the order differs'}. Give both the same categories."
        )
    if not coco.with_objects():
        told = "".join(f"\n{line}" for line in coco.told()[1:6])
        raise UserError(f"{key}: {annotations} has no object that could be used.{told}")
    return coco


# ---------------------------------------------------------------- the file


def _read(path: Path, key: str) -> dict[str, Any]:
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir() if p.suffix == ".json"] if path.parent.is_dir() else []
        hint = nearest(path.name, beside) if beside else ""
        raise UserError(f"{key}: no file {path}.{printable(hint)}")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{key}: {path} cannot be read as JSON: {first_line(error)}") from None
    if isinstance(data, list) and data and isinstance(data[0], dict) and "score" in data[0]:
        raise UserError(f"{key}: {path} holds results (predictions with scores), not annotations")
    parts = ("images", "annotations", "categories")
    missing = [part for part in parts if not isinstance(data, dict) or not isinstance(data.get(part), list)]
    if missing:
        raise UserError(
            f"{key}: {path} is not COCO's format: it has no list of {' or '.join(missing)}. Instance annotations are "
            "needed, such as instances_train2017.json."
        )
    entries = data["annotations"]
    if entries and not any(isinstance(entry, dict) and "bbox" in entry for entry in entries):
        raise UserError(f"{key}: no annotation in {path} has a bbox; captions and the like have none. Use instances.")
    if entries and not any(isinstance(entry, dict) and entry.get("segmentation") for entry in entries):
        raise UserError(f"{key}: no annotation in {path} has a segmentation, and Mask R-CNN learns masks.")
    return data


def _note(problems: dict[str, list[str]], kind: str, where: object) -> None:
    problems.setdefault(kind, []).append(str(where))


def _categories(entries: list[Any], key: str, problems: dict[str, list[str]]) -> dict[int, str]:
    """id: name, by ascending id."""
    found: dict[int, str] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not _whole(entry.get("id")) or not isinstance(entry.get("name"), str):
            raise UserError(f"{key}: a category needs a whole number as id and a name; this has not: {_shown(entry)}")
        id, name = entry["id"], entry["name"]
        if found.setdefault(id, name) != name:
            raise UserError(f"{key}: category id {id} stands for {printable(found[id])!r} and {printable(name)!r}")
    twice = [name for name, times in Counter(found.values()).items() if times > 1]
    if twice:
        ids = [id for id, name in found.items() if name == twice[0]]
        raise UserError(f"{key}: two categories are called {printable(twice[0])!r}: ids {ids}; give each its own name")
    repeated = len(entries) - len(found)
    if repeated:
        problems["categories listed again, counted once"] = ["categories"] * repeated
    return dict(sorted(found.items()))


def _pictures(entries: list[Any], folder: Path, key: str, problems: dict[str, list[str]]) -> dict[Hashable, Picture]:
    found: dict[Hashable, Picture] = {}
    for entry in entries:
        usable = isinstance(entry, dict) and isinstance(entry.get("id"), (int, str))
        if not usable or not isinstance(entry.get("file_name"), str):
            _note(problems, "image entries without id or file_name, left out", _shown(entry))
            continue
        path = os.path.join(folder, entry["file_name"])
        height, width = entry.get("height"), entry.get("width")
        if not (_whole(height) and _whole(width) and 0 < height < FARTHEST and 0 < width < FARTHEST):
            height = width = 0  # read from the file, if there is one
        picture = Picture(entry["id"], path, height, width)
        before = found.setdefault(picture.id, picture)
        if before.path != path:
            raise UserError(
                f"{key}: image id {shortened(str(picture.id), 40)} stands for "
                f"{printable(os.path.basename(before.path))} and {printable(os.path.basename(path))}: "
                "it is not known which of them an annotation means"
            )
        if before is not picture:
            _note(problems, "images listed again, counted once", entry["file_name"])
    return found


def _with_files(
    pictures: dict[Hashable, Picture], folder: Path, key: str, problems: dict[str, list[str]]
) -> list[Picture]:
    """Those with a file and a size. Raises `UserError` if too many have none."""
    missing = [p for p in pictures.values() if not os.path.isfile(p.path)]
    if len(missing) > max(1, MISSING_ALLOWED * len(pictures)) or len(missing) == len(pictures) > 0:
        first = os.path.relpath(missing[0].path, folder)
        raise UserError(
            f"{key}: {len(missing)} of {len(pictures)} images are not in {folder}; the first: {printable(first)}."
            + _where_they_may_be(folder, first)
        )
    gone = {id(p) for p in missing}
    for p in missing:
        _note(problems, "images whose file is missing, left out", os.path.basename(p.path))
    present = [p for p in pictures.values() if id(p) not in gone]
    for p in present:
        if not p.height:
            _read_size(p, problems)
    return [p for p in present if p.height]


def _read_size(picture: Picture, problems: dict[str, list[str]]) -> None:
    try:
        with Image.open(picture.path) as image:
            picture.width, picture.height = image.size
    except Exception:  # Pillow raises nearly anything
        _note(
            problems,
            "images without width and height whose file cannot be read, left out",
            os.path.basename(picture.path),
        )


def _where_they_may_be(folder: Path, name: str) -> str:
    if not folder.is_dir():
        beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        return f" There is no such folder.{printable(nearest(folder.name, beside)) if beside else ''}"
    base = os.path.basename(name)
    below = [sub.name for sub in sorted(folder.iterdir()) if (sub / base).is_file()]
    if below:
        return f" It is in {folder / printable(below[0])}: give that folder."
    there = [p for p, _ in zip((e.name for e in os.scandir(folder) if is_image(e.name)), range(2000))]
    return printable(nearest(base, there)) if there else f" {folder} holds no images."


# ---------------------------------------------------------------- annotations


def _add_instances(
    entries: list[Any], pictures: dict[Hashable, Picture], labels: dict[int, int], problems: dict[str, list[str]]
) -> None:
    seen: dict[Any, Any] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            _note(problems, "annotations that are no objects in JSON, left out", _shown(entry))
            continue
        where = f"annotation {shortened(str(entry.get('id')), 40)}"
        picture = pictures.get(entry.get("image_id")) if isinstance(entry.get("image_id"), (int, str)) else None
        if picture is None:
            _note(problems, "annotations of images that are not listed, left out", where)
            continue
        label = labels.get(entry["category_id"]) if _whole(entry.get("category_id")) else None
        if label is None:
            valid = ", ".join(map(str, list(labels)[:5]))
            _note(
                problems,
                f"annotations of categories that are not listed (ids {valid}, ... are), left out",
                f"{where}: {_shown(entry.get('category_id'))}",
            )
            continue
        if _seen_before(entry, seen, where, problems):
            continue
        if not picture.height:
            continue  # it is left out, and told
        instance = _instance(entry, picture, label, where, problems)
        if instance is not None:
            picture.instances.append(instance)


def _seen_before(entry: dict[str, Any], seen: dict[Any, Any], where: str, problems: dict[str, list[str]]) -> bool:
    """Whether the very annotation has been met. Ids play no further part, so two objects may share one."""
    id = entry.get("id")
    if not isinstance(id, (int, str)):
        return False
    before = seen.setdefault(id, entry)
    if before is entry:
        return False
    if before == entry:
        _note(problems, "annotations listed again, counted once", where)
        return True
    _note(problems, "annotation ids that stand for several objects, all kept", where)
    return False


def _instance(
    entry: dict[str, Any], picture: Picture, label: int, where: str, problems: dict[str, list[str]]
) -> Instance | None:
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):
        _note(problems, "annotations whose iscrowd is neither 0 nor 1, left out", where)
        return None
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_number(v) for v in box):
        _note(problems, "annotations without a box of four numbers, left out", where)
        return None
    clipped, problem = _clipped(box, picture)
    if problem:
        _note(problems, problem, where)
    if clipped is None:
        return None
    mask, problem = _usable_mask(entry.get("segmentation"), picture)
    if problem:
        _note(problems, problem, where)
    if mask is None:
        return None
    area: Any = entry.get("area")
    return Instance(label, clipped, mask, bool(crowd), float(area) if _number(area) and area > 0 else None)


def _clipped(box: list[float], picture: Picture) -> tuple[tuple[float, float, float, float] | None, str]:
    """The part of x, y, width, height within the image, or None; and what is wrong."""
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return None, "boxes without area, left out"
    left, top = max(x, 0.0), max(y, 0.0)
    right, bottom = min(x + width, picture.width), min(y + height, picture.height)
    if right <= left or bottom <= top:
        return None, "boxes wholly outside their image, left out"
    if min(right - left, bottom - top) < SHORTEST:
        return None, f"boxes with a side below {SHORTEST} pixels within their image, left out"
    outside = max(left - x, top - y, x + width - right, y + height - bottom)
    # a rounded coordinate is no mistake
    return (left, top, right - left, bottom - top), "boxes partly outside their image, clipped" if outside > 1 else ""


def _usable_mask(mask: Any, picture: Picture) -> tuple[Any, str]:
    """Polygons or RLE, or None; and what is wrong. The box is no substitute: it would teach wrong masks."""
    if isinstance(mask, list):
        good = [polygon for polygon in mask if _is_polygon(polygon)]
        if not good:
            return None, "annotations whose polygons are empty or malformed, left out"
        return good, "annotations with some malformed polygons, the others kept" if len(good) < len(mask) else ""
    if isinstance(mask, dict):
        counts = rle_counts(mask.get("counts"))
        if counts is None or sum(counts) != picture.height * picture.width:
            return None, "annotations whose RLE does not cover their image exactly, left out"
        if mask.get("size") != [picture.height, picture.width]:
            return None, "annotations whose RLE has another size than their image, left out"
        if not any(counts[1::2]):
            return None, "annotations whose RLE is empty, left out"
        return mask, ""
    return None, "annotations without a segmentation, left out"


def _is_polygon(polygon: Any) -> bool:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return False
    return all(_number(v) and abs(v) < FARTHEST for v in polygon)


# ---------------------------------------------------------------- values


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9  # nor NaN


def _shown(value: Any) -> str:
    return shortened(repr(value), 60)
