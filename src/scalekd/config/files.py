"""Recipes as files: those that come with scalekd and people's own, with their `base`, and overrides of single values."""

from __future__ import annotations

import reprlib
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from scalekd.common.errors import UserError, nearest
from scalekd.common.files import is_file
from scalekd.common.text import shortened
from scalekd.common.yaml_file import parse_yaml


class Shelf(NamedTuple):
    """The recipes that come with scalekd for a task."""

    folder: str
    """In the package."""
    command: str
    """Lists them."""


DISTILLATION = Shelf("config/recipes", "scalekd recipes")


def shipped(folder: str) -> dict[str, Any]:
    """The YAML files of a folder of the package, by name without the ending, in order."""
    files = {p.name.removesuffix(".yaml"): p for p in (resources.files("scalekd") / folder).iterdir()}
    return {name: files[name] for name in sorted(files) if files[name].name.endswith(".yaml")}


def recipe_names(shelf: Shelf = DISTILLATION) -> list[str]:
    return list(shipped(shelf.folder))


def recipe_text(recipe: str, shelf: Shelf = DISTILLATION) -> str:
    """The YAML of a shipped recipe's name or of a file."""
    files = shipped(shelf.folder)
    if recipe in files:
        return files[recipe].read_text()
    path = Path(recipe)
    if not is_file(path):
        raise UserError(
            f"no recipe `{shortened(recipe)}`: neither a file nor a shipped one.{nearest(recipe, files)} "
            f"`{shelf.command}` lists them."
        )
    try:
        return path.read_text()
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{recipe} cannot be read as text: {error}") from None


def recipe_values(recipe: str, within: tuple[str, ...] = (), shelf: Shelf = DISTILLATION) -> dict[str, Any]:
    """What a recipe says, with what its `base` says where it says nothing itself (`merged`).

    within: the recipes whose base this one is.
    """
    values = parse_yaml(recipe_text(recipe, shelf), recipe)
    if not isinstance(values, dict):
        raise UserError(f"{recipe} is not a recipe: it must be a mapping with data, student, losses, train, ...")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{recipe}: base: the name of a recipe or a YAML file (given {reprlib.repr(base)})")
    beside = Path(recipe).parent / base
    if base not in recipe_names(shelf) and is_file(beside):
        base = str(beside)
    if base in (*within, recipe):
        raise UserError(f"{recipe}: base: {shortened(base)} is made from this recipe; name another")
    try:
        return merged(recipe_values(base, (*within, recipe), shelf), values)
    except UserError as error:
        raise UserError(f"{recipe}: base: {error}") from None


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes` in their place, section by section and key by key.

    Whole are replaced: `losses`, and a student or teacher that names a model, so that no option of another model stays.
    """
    result = dict(values)
    for section, change in changes.items():
        before = values.get(section)
        whole = section == "losses" or (isinstance(change, dict) and "model" in change)
        both = isinstance(before, dict) and isinstance(change, dict)
        result[section] = before | change if both and not whole else change
    return result


def override(values: dict[str, Any], assignment: str) -> None:
    """Sets the value that `section.key=value` names, in place. Raises `UserError`."""
    key, equals, text = assignment.partition("=")
    shown = shortened(assignment)
    if not equals or not key or not key.isprintable():
        raise UserError(f"`{shown}` is not an override: write key=value, such as optim.lr=1e-3")
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        if inner is None:
            inner = values[parent] = {}
        if not isinstance(inner, dict):
            raise UserError(f"`{shown}`: {parent} is a value, it has no `{last}`")
        values = inner
    values[last] = parse_yaml(text, f"`{shown}`")


FIELDS = ("command", "stands for", "expected", "cost", "status")


def header(text: str) -> dict[str, str]:
    """What the comment at the top of a recipe says: its first line as `summary`, and each of FIELDS, "" if missing."""
    lines = [line.removeprefix("#").strip() for line in header_lines(text)]
    said = dict(line.split(":", 1) for line in lines if line.split(":")[0] in FIELDS)
    return {"summary": lines[0] if lines else ""} | {f.replace(" ", "_"): said.get(f, "").strip() for f in FIELDS}


def header_lines(text: str) -> list[str]:
    return list(takewhile(lambda line: line.startswith("#"), text.splitlines()))
