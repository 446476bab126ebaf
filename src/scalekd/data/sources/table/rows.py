"""From the columns of a table to the path and the labels of each image."""

from __future__ import annotations

import ast
import os
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

from scalekd.common.errors import UserError, nearest
from scalekd.common.text import shortened

from ..names import split_of
from .columns import Columns, plain, read_columns
from .problems import Problems
from .text import SEPARATORS, TableText

PATHS = ("path", "image", "file", "filename", "filepath", "file_name", "file_path", "image_path")
LABELS = ("label", "labels", "class", "classes", "target", "targets", "category", "tags")
SPLIT_COLUMNS = ("split", "subset", "partition")
YES, NO = ("1", "true", "yes"), ("0", "false", "no", "")
REST = "rest"  # value of `label`: every column that is not used otherwise


class Rows(NamedTuple):
    """The images of a table, before their labels are numbered."""

    paths: list[str]  # as written
    labels: list[tuple[str, ...]]
    numbers: list[int]  # of each row, for messages
    several: bool  # whether the labels of an image are a set


class Chosen(NamedTuple):
    """The columns of a table by their role."""

    path: str
    labels: list[str]  # several: one column of 0 and 1 for each class
    split: str | None


def rows_of(text: TableText, key: str, problems: Problems, labelled: bool = True) -> Rows:
    """The images of a table, of the chosen split. Adds to `problems`. Raises `UserError` for wrong columns.

    labelled: False reads no labels.
    """
    columns = read_columns(text, key, problems)
    chosen = _chosen(text, columns, key, labelled)
    paths = _paths(text, columns, chosen, problems)
    if labelled:
        labels, several = _labels(text, columns, chosen, key, problems)
    else:
        labels, several = [()] * len(paths), False
    kept = _of_split(text, columns, chosen, paths, key, problems)
    rows = Rows([paths[i] for i in kept], [labels[i] for i in kept], [columns.rows[i] for i in kept], several)
    return _joined(rows) if several and text.options.get("labels") == "several" else rows


def splits_of(text: TableText, key: str) -> dict[str, str]:
    """Split -> its value in the column of splits; empty if the table has no such column, or `split` is set."""
    if "split" in text.options or text.kind == "coco":
        return {}
    columns = read_columns(text, key, Problems())
    name = _split_column(text, columns, key)
    values = dict.fromkeys(map(str, columns.values[name])) if name else {}
    return {split: value for value in values if (split := split_of(value))}


def _chosen(text: TableText, columns: Columns, key: str, labelled: bool) -> Chosen:
    names = list(columns.values)
    path = _column(text, names, "path", PATHS, key)
    split = _split_column(text, columns, key)
    if not labelled:
        return Chosen(path, [], split)
    wanted = text.options.get("label", "")
    if wanted == REST and REST not in names:
        labels = [name for name in names if name not in (path, split)]
    elif "+" in wanted and wanted not in names:
        labels = wanted.split("+")
        for name in labels:
            _check_column(text, names, "label", name, key)
    else:
        labels = [_column(text, [n for n in names if n != path], "label", LABELS, key)]
    if not labels:
        raise UserError(f"{key}: {text.name} has no column of labels besides {path}")
    return Chosen(path, labels, split)


def _column(text: TableText, names: Sequence[str], option: str, usual: Sequence[str], key: str) -> str:
    """The column that an option names, or else the only one with a usual name. Raises `UserError`."""
    if option in text.options:
        return _check_column(text, names, option, text.options[option], key)
    found = [name for name in names if name.lower() in usual]
    if len(found) == 1:
        return found[0]
    listed = shortened(", ".join(found or names), 300)
    problem = f"may hold the {option} in several columns" if found else f"has no column that is named as a {option}"
    raise UserError(
        f"{key}: {text.name} {problem}: {listed}. Name the column: {text.with_option(option, 'COLUMN')}"
        + ". The first row must be the header" * (not found and text.kind != "parquet")
    )


def _check_column(text: TableText, names: Sequence[str], option: str, name: str, key: str) -> str:
    if name not in names:
        listed = nearest(name, names) or f" It has {shortened(', '.join(names), 300)}."
        raise UserError(f"{key}: {text.name} has no column `{shortened(name)}` ({option}).{listed}")
    return name


def _split_column(text: TableText, columns: Columns, key: str) -> str | None:
    """The column of splits: the option `splits`, or a column of that name in which every value names a split."""
    if "splits" in text.options:
        return _check_column(text, list(columns.values), "splits", text.options["splits"], key)
    for name, values in columns.values.items():
        if name.lower() in SPLIT_COLUMNS and all(isinstance(v, str) and split_of(v) for v in set(map(str, values))):
            return name
    if "split" in text.options:
        raise UserError(
            f"{key}: {text.name} has no column of splits; name it: {text.with_option('splits', 'COLUMN')}. It has "
            f"{shortened(', '.join(columns.values), 300)}"
        )
    return None


def _paths(text: TableText, columns: Columns, chosen: Chosen, problems: Problems) -> list[str]:
    """The paths, with their suffix; "" where there is none."""
    suffix, paths = text.options.get("suffix", ""), []
    for row, cell in zip(columns.rows, columns.values[chosen.path]):
        if not isinstance(cell, str):
            problems.add("rows whose path is no text (images inside the file: `hf:FOLDER` reads them)", row)
        elif not cell:
            problems.add("rows without a path", row)
        paths.append(cell + suffix if isinstance(cell, str) and cell else "")
    return paths


def _labels(
    text: TableText, columns: Columns, chosen: Chosen, key: str, problems: Problems
) -> tuple[list[tuple[str, ...]], bool]:
    """The labels of each row, and whether they are sets. Raises `UserError` for a separator that separates nothing."""
    separator = text.options.get("separator")
    cells = columns.values[chosen.labels[0]]
    in_lists = any(isinstance(cell, list) for cell in cells)  # of a Parquet file
    if separator and (in_lists or len(chosen.labels) > 1):
        form = "has a column for each class" if len(chosen.labels) > 1 else "has lists of labels"
        raise UserError(f"{key}: {text.name} {form}, which `separator` does not apply to; remove it")
    if len(chosen.labels) > 1:
        return _of_yes_and_no(columns, chosen.labels, problems), True
    if in_lists:
        return _of_lists(columns, cells, problems), True
    if odd := [row for row, cell in zip(columns.rows, cells) if not isinstance(cell, str)]:
        for row in odd:
            problems.add("rows whose label is no text and no number", row)
        return [()] * len(cells), False
    if separator is None and all(cell[:1] == "[" and cell[-1:] == "]" for cell in cells):
        return _of_lists(columns, cells, problems), True
    split = [tuple(p.strip() for p in cell.split(separator)) if separator else (cell,) for cell in cells]
    labels = [tuple(label for label in row if label) for row in split]
    _tell_other_separator(columns, labels, problems)
    return labels, bool(separator) or text.options.get("labels") == "several"


def _of_yes_and_no(columns: Columns, names: Sequence[str], problems: Problems) -> list[tuple[str, ...]]:
    """The labels of rows that have a column of 0 and 1 for each class."""
    rows = []
    cells = list(zip(*(columns.values[name] for name in names)))
    for number, row in zip(columns.rows, cells):
        texts = [str(cell).lower() for cell in row]
        if odd := [f"{name} {text}" for name, text in zip(names, texts) if text not in YES + NO]:
            problems.add("rows with other values than 0 and 1 in the columns of the classes", number, odd[0])
        rows.append(tuple(name for name, text in zip(names, texts) if text in YES))
    return rows


def _of_lists(columns: Columns, cells: Sequence[Any], problems: Problems) -> list[tuple[str, ...]]:
    """The labels of rows with a list of names, or a text such as `['cat', 'dog']`, as pandas writes lists.

    Names that are empty or missing are left out.
    """
    rows: list[tuple[str, ...]] = []
    for number, cell in zip(columns.rows, cells):
        try:
            values = [plain(value) for value in (ast.literal_eval(cell) if isinstance(cell, str) and cell else cell)]
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            values = [None]
        if not all(isinstance(value, str) for value in values):
            problems.add("rows whose label is no list of names", number, str(cell))
            values = []
        rows.append(tuple(value for value in values if value))
    return rows


def _tell_other_separator(columns: Columns, labels: Sequence[tuple[str, ...]], problems: Problems) -> None:
    """Adds rows whose label is several labels of other rows, joined by a character that is not the separator."""
    known = {label for row in labels for label in row}
    for number, row in zip(columns.rows, labels):
        for label in row:
            if name := separator_in(label, known):
                kind = f"rows with several labels among rows with one; write separator={name} if they are sets"
                problems.add(kind, number, label)


def separator_in(label: str, known: Container[str]) -> str:
    """The name of the separator if a text is several known labels, joined by it; else ""."""
    for name, char in SEPARATORS.items():
        parts = [part.strip() for part in label.split(char)] if char in label and name != "space" else []
        if len(parts) > 1 and all(part in known for part in parts):
            return name
    return ""


def _of_split(
    text: TableText, columns: Columns, chosen: Chosen, paths: Sequence[str], key: str, problems: Problems
) -> list[int]:
    """The indices of the rows of the split that `split` names. Adds images that are in two splits."""
    if chosen.split is None:
        return list(range(len(paths)))
    values = [str(value) for value in columns.values[chosen.split]]
    wanted = text.options.get("split")
    distinct = sorted(set(values))
    if wanted is None and len(distinct) > 1:
        raise UserError(
            f"{key}: {text.name} has rows of several splits: {shortened(', '.join(distinct), 200)}. Name one: "
            f"{text.with_option('split', distinct[0])}"
        )
    first: dict[str, int] = {}
    for i, path in enumerate(map(os.path.normpath, paths)):
        before = first.setdefault(path, i)
        if paths[i] and values[before] != values[i]:
            detail = f"{path}: {values[i]}, and {values[before]} in row {columns.rows[before]}"
            problems.add("images in two splits", columns.rows[i], detail)
    if wanted is None or wanted in distinct:
        named = [wanted or distinct[0]]
    else:  # `val` also names the rows of `valid`
        named = [value for value in distinct if split_of(value) == split_of(wanted) is not None]
    if not named:
        raise UserError(
            f"{key}: {text.name} has no rows of the split `{shortened(wanted or '')}`.{nearest(wanted or '', distinct)}"
        )
    return [i for i, value in enumerate(values) if value in named]


def _joined(rows: Rows) -> Rows:
    """One row for each image of a table that has a row for each label; the number is that of the image's first row."""
    places: dict[str, int] = {}
    joined = Rows([], [], [], True)
    for path, labels, number in zip(rows.paths, rows.labels, rows.numbers):
        place = places.setdefault(os.path.normpath(path), len(joined.paths))
        if place == len(joined.paths):
            joined.paths.append(path)
            joined.labels.append(labels)
            joined.numbers.append(number)
        else:
            joined.labels[place] += labels
    return joined
