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
    images = content["images"]
    paths = [str(image.get("file_name") or "") for image in images]
    numbers = list(range(1, len(images) + 1))
    for number, path, image in zip(numbers, paths, images):
        if not path:
            problems.add("images without a file_name", number, f"id {image.get('id')}")
    if not labelled:
        return Rows(paths, [()] * len(paths), numbers, False), []
    names = _names(content["categories"], problems)
    found: dict[Any, dict[str, None]] = {}
    for number, image in zip(numbers, images):
        if image["id"] in found:
            problems.add("images with an id that another image has", number, f"id {image['id']}")
        found[image["id"]] = {}
    for number, annotation in enumerate(content["annotations"], 1):
        of_image, category = annotation["image_id"], annotation["category_id"]
        if of_image not in found or category not in names:
            kind = "annotations of an image or a category that is not in the file"
            what = f"image_id {of_image}" if of_image not in found else f"category_id {category}"
            problems.add(kind, number, what, "annotation")
        else:
            found[of_image][names[category]] = None
    labels = [tuple(found[image["id"]]) for image in images]
    several = any(len(row) > 1 for row in labels) or text.options.get("labels") == "several"
    return Rows(paths, labels, numbers, several), list(names.values())


def _read(text: TableText, key: str, labelled: bool) -> dict[str, list[dict[str, Any]]]:
    try:
        content = json.loads(text.file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key}: {text.name} is not JSON: {first_line(error)}") from None
    for name in LISTS if labelled else LISTS[:1]:
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries) or not entries:
            raise UserError(f"{key}: {text.name} has no list `{name}`; it must have {', '.join(LISTS)} as COCO's files")
        ids = ("image_id", "category_id") if name == "annotations" else ("id",)
        odd = [e for e in entries for k in ids if not isinstance(e.get(k), int | str)]
        if odd and labelled:
            raise UserError(
                f"{key}: {text.name} has entries in `{name}` without a number or a text as {' and '.join(ids)}: "
                f"{shortened(str(odd[0]), 100)}"
            )
    return content


def _names(categories: list[dict[str, Any]], problems: Problems) -> Mapping[Any, str]:
    """id -> name, sorted by id."""
    ids, given = Counter(c["id"] for c in categories), Counter(str(c.get("name")) for c in categories)
    for number, category in enumerate(categories, 1):
        id, name = category["id"], category.get("name")
        if not isinstance(name, str) or not name or given[name] > 1:
            problems.add("categories without a name of their own", number, f"id {id}", "category")
        elif ids[id] > 1:
            problems.add("categories with an id that another category has", number, f"id {id}: {name}", "category")
    names = {c["id"]: str(c.get("name")) for c in categories}
    return {id: names[id] for id in sorted(names, key=lambda id: (isinstance(id, str), id))}
