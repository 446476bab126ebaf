"""COCO-style JSON of a classification: `images`, `annotations` with a category for each label, `categories`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from scalekd.common.errors import UserError, first_line
from scalekd.common.text import shortened

from .problems import Problems
from .rows import Rows
from .text import TableText

LISTS = ("images", "annotations", "categories")


def coco_rows(text: TableText, key: str, problems: Problems, labelled: bool = True) -> tuple[Rows, list[str]]:
    """The images, in the order of the file, and the names of the categories, in the order of their ids.

    Boxes and masks are ignored. The labels are a set if an image has several categories or `labels=several` is set.
    Adds to `problems`. Raises `UserError` for a file of another form.
    """
    content = _read(text, key, labelled)
    names = _names(content["categories"], problems) if labelled else {}
    images = content["images"]
    paths = [str(image.get("file_name", "")) for image in images]
    for number, (path, image) in enumerate(zip(paths, images), 1):
        if not path:
            problems.add("images without a file_name", number, f"id {image.get('id')}")
    found: dict[Any, dict[str, None]] = {}
    for number, image in enumerate(images, 1):
        if image.get("id") in found:
            problems.add("images with an id that another image has", number, f"id {image.get('id')}")
        found[image.get("id")] = {}
    annotations = content["annotations"] if labelled else []
    for number, annotation in enumerate(annotations, 1):
        of_image, category = annotation.get("image_id"), annotation.get("category_id")
        if of_image not in found or category not in names:
            what = f"image_id {of_image}" if of_image not in found else f"category_id {category}"
            problems.add("annotations of an image or a category that is not in the file", number, f"annotation: {what}")
        else:
            found[of_image][names[category]] = None
    labels = [tuple(found[image.get("id")]) for image in images]
    several = any(len(row) > 1 for row in labels)
    if text.options.get("labels") == "one" and several:
        for number, row in enumerate(labels, 1):
            if len(row) > 1:
                problems.add("images with several labels, and `labels=one` is set", number, ", ".join(row))
    several = several or text.options.get("labels") == "several"
    return Rows(paths, labels, list(range(1, len(paths) + 1)), several), list(names.values())


def _read(text: TableText, key: str, labelled: bool) -> dict[str, list[dict[str, Any]]]:
    try:
        content = json.loads(text.file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key}: {text.name} is not JSON: {first_line(error)}") from None
    for name in LISTS if labelled else LISTS[:1]:
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries) or not entries:
            raise UserError(f"{key}: {text.name} has no list `{name}`; it must have {', '.join(LISTS)} as COCO's files")
        odd = [e for e in entries for k in ("id", "image_id", "category_id") if not isinstance(e.get(k, 0), int | str)]
        if odd:
            raise UserError(
                f"{key}: {text.name} has ids in `{name}` that are neither numbers nor text: {shortened(str(odd[0]), 100)}"
            )
    return content


def _names(categories: list[dict[str, Any]], problems: Problems) -> Mapping[Any, str]:
    """id -> name, sorted by id."""
    names = {c.get("id"): str(c.get("name", "")) for c in categories}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    for number, category in enumerate(categories, 1):
        if not category.get("name") or category["name"] in twice:
            problems.add("categories without a name of their own", number, f"category {category.get('id')}")
    order = sorted(names, key=lambda i: (isinstance(i, str), i))
    return {i: names[i] for i in order}
