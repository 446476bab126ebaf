"""`Table`: the images that a table of paths and labels names."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from scalekd.common.errors import UserError, did_you_mean
from scalekd.common.text import printable
from scalekd.data.images import EXTENSIONS
from scalekd.data.targets import Target

from ..in_files import InFiles
from ..names import LeftOut
from .coco import coco_rows
from .problems import MOST, Problems
from .rows import Rows, rows_of, separator_in, splits_of
from .text import TableText, table_of

NUMBER = re.compile(r"-?[0-9]{1,9}")
MAX_CLASSES = 1_000_000


class Table(InFiles):
    """The images of a table, in its order. All rows are checked when it is opened, and all problems told together.

    Args:
        text: the table, as `table_of` reads it.
        key: the recipe key, for messages.
        classes: the class names of other images, such as the training images, which labels must be among.

    Raises:
        UserError: for a file, a column or an option that is wrong, and with row numbers for rows that cannot be used.
    """

    def __init__(self, text: str, key: str, classes: Sequence[str] | None = None):
        table = table_of(text, key)
        problems = Problems("image" if table.kind == "coco" else "row")
        rows, known = _read(table, key, problems)
        self.table, self.numbers, self.paths = table.name, rows.numbers, rows.paths
        self.word = problems.word
        self.files = _files(table, rows, problems)
        _check_twice(table, rows, self.files, problems)
        _check_empty(table, rows, key, problems)
        self.classes, number = _classes(table, rows, classes, known, key)
        _check_known(rows, number, self.classes, problems)
        problems.raise_if_any(key, table.name)
        self.targets = [_target(labels, number, rows.several) for labels in rows.labels]
        self.left_out: LeftOut = {}

    def where(self, i: int) -> str:
        return printable(f"{self.paths[i]} ({self.word} {self.numbers[i]} of {self.table})")


def files_in(text: str, key: str) -> tuple[list[str], list[str]]:
    """The files of the images of a table, and their paths as written there, without the labels. Raises `UserError`."""
    table = table_of(text, key)
    problems = Problems("image" if table.kind == "coco" else "row")
    rows = coco_rows(table, key, problems, False)[0] if table.kind == "coco" else rows_of(table, key, problems, False)
    files = _files(table, rows, problems)
    problems.raise_if_any(key, table.name)
    unique = dict(zip(files, rows.paths))  # a table may have a row for each label
    return list(unique), list(unique.values())


def table_parts(text: str) -> dict[str, str]:
    """Split -> text, for a table whose rows say their split; else empty. Raises `UserError`."""
    table = table_of(text, "`data`")
    return {split: table.with_option("split", value) for split, value in splits_of(table, "`data`").items()}


def _read(table: TableText, key: str, problems: Problems) -> tuple[Rows, list[str] | None]:
    """The rows, and the names of the classes if the file lists them. With `labels=one`, lists of one label are no sets."""
    rows, known = coco_rows(table, key, problems) if table.kind == "coco" else (rows_of(table, key, problems), None)
    if not rows.several or table.options.get("labels") != "one":
        return rows, known
    for number, labels in zip(rows.numbers, rows.labels):
        if len(set(labels)) > 1:
            problems.add("images with several labels, and `labels=one` is set", number, ", ".join(labels))
    return rows._replace(several=False), known


def _files(table: TableText, rows: Rows, problems: Problems) -> list[str]:
    """The file of each row. Adds those that do not exist; reads each folder once instead of asking for each file."""
    root = str(table.root)
    files = [os.path.normpath(os.path.join(root, path)) for path in rows.paths]
    listed: dict[str, set[str]] = {}
    for number, path, file in zip(rows.numbers, rows.paths, files):
        folder, name = os.path.split(file)
        if folder not in listed:
            listed[folder] = _names_in(folder)
        if path and name not in listed[folder]:
            ending = next((e for e in EXTENSIONS if name + e in listed[folder]), None)
            kind = f"files that do not exist below {root or '.'}"
            kind += f"; write suffix={ending}" * bool(ending) or "; `root=FOLDER` sets another folder"
            problems.add(kind, number, path)
    return files


def _names_in(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder or "."))
    except OSError:
        return set()


def _check_twice(table: TableText, rows: Rows, files: Sequence[str], problems: Problems) -> None:
    kind = f"images that another {problems.word} has too"
    kind += "; labels=several joins the rows of an image" * (table.kind != "coco")
    first: dict[str, int] = {}
    for i, file in enumerate(files):
        before = first.setdefault(file, i)
        if before != i and rows.paths[i]:
            problems.add(kind, rows.numbers[i], f"{rows.paths[i]}, first in {problems.word} {rows.numbers[before]}")


def _check_empty(table: TableText, rows: Rows, key: str, problems: Problems) -> None:
    """Adds images without a label. In multi-label data `empty=keep` takes them as images of none of the classes."""
    if table.options.get("empty") == "keep":
        if not rows.several:
            raise UserError(
                f"{key}: {table.name}: `empty=keep` is for sets of labels, and each image has one label here; remove it, or "
                "add `labels=several`"
            )
        return
    kind = "images without a label" + "; empty=keep takes them as images of none of the classes" * rows.several
    for number, path, labels in zip(rows.numbers, rows.paths, rows.labels):
        if not labels:
            problems.add(kind, number, path)


def _classes(
    table: TableText, rows: Rows, given: Sequence[str] | None, known: list[str] | None, key: str
) -> tuple[list[str], dict[str, int]]:
    """The class names, and the index of each valid label.

    The names are those that are given, of the file `classes`, or of the labels, sorted. Labels that are all whole
    numbers are indices, unless one of them is the name of another class than the one of that index.
    """
    if given is None and "classes" in table.options:
        given = _listed(table, key)
    labels = {label for row in rows.labels for label in row}
    numbers = {int(label) for label in labels if NUMBER.fullmatch(label)}
    indices = len(numbers) > 0 and all(map(NUMBER.fullmatch, labels))
    if given is None and known is None and indices:
        given = [str(i) for i in range(min(max(numbers) + 1, MAX_CLASSES))]
    names = list(given if given is not None else known if known is not None else sorted(labels))
    number = {name: i for i, name in enumerate(names)}
    if indices and all(number.get(label, int(label)) == int(label) for label in labels):
        number |= {label: int(label) for label in labels if 0 <= int(label) < len(names)}
    return names, number


def _listed(table: TableText, key: str) -> list[str]:
    """The class names in the file that the option `classes` names, one in a line."""
    file = table.file.parent / os.path.expanduser(table.options["classes"])
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{key}: {table.name}: classes: cannot read {file}: {reason}") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names or len(set(names)) < len(names):
        problem = "a name twice" if names else "no names"
        raise UserError(f"{key}: {table.name}: classes: {file} has {problem}; it must have one class per line")
    return names


def _check_known(rows: Rows, number: dict[str, int], classes: Sequence[str], problems: Problems) -> None:
    kind, hints = f"labels that are none of the {len(classes)} classes", dict[str, str]()
    for row, labels in zip(rows.numbers, rows.labels):
        for label in labels:
            if label in number:
                continue
            if name := separator_in(label, number):
                problems.add(f"labels that are several classes; write separator={name} if they are sets", row, label)
            else:
                if len(hints) < MOST:  # looking for the nearest name is slow, and no more are shown
                    hints.setdefault(label, did_you_mean(label, classes))
                problems.add(kind, row, f"`{label}`{hints.get(label, '')}")


def _target(labels: Sequence[str], number: dict[str, int], several: bool) -> Target:
    found = sorted({number[label] for label in labels})
    return tuple(found) if several else found[0]
