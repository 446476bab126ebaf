"""Reads recipe files, shipped or your own, with their `base`, and applies overrides of single values."""

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
    """The shipped recipes of a task."""

    folder: str
    """Folder within the package."""
    command: str
    """The command that lists the recipes."""


DISTILLATION = Shelf("config/recipes", "scalekd recipes")


def shipped(folder: str) -> dict[str, Any]:
    """The YAML files in a folder of the package, by name without the suffix, sorted."""
    files = {p.name.removesuffix(".yaml"): p for p in (resources.files("scalekd") / folder).iterdir()}
    return {name: files[name] for name in sorted(files) if files[name].name.endswith(".yaml")}


def recipe_names(shelf: Shelf = DISTILLATION) -> list[str]:
    """Names of the shipped recipes, sorted."""
    return list(shipped(shelf.folder))


def recipe_text(recipe: str, shelf: Shelf = DISTILLATION) -> str:
    """The YAML text of a shipped recipe, given by name, or of a file. Raises `UserError` if there is neither."""
    files = shipped(shelf.folder)
    if recipe in files:
        return files[recipe].read_text()
    path = Path(recipe)
    if not is_file(path):
        raise UserError(
            f"no recipe `{shortened(recipe)}`: not a file and not a shipped recipe.{nearest(recipe, files)} "
            f"`{shelf.command}` lists the shipped ones."
        )
    try:
        return path.read_text()
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{recipe} cannot be read as text: {error}") from None


def recipe_values(recipe: str, within: tuple[str, ...] = (), shelf: Shelf = DISTILLATION) -> dict[str, Any]:
    """The values of a recipe, with those of its `base` for everything that it does not set (see `merged`).

    within: the recipes that have this one as their base, to detect cycles.
    """
    values = parse_yaml(recipe_text(recipe, shelf), recipe)
    if not isinstance(values, dict):
        raise UserError(f"{recipe} is not a recipe: it must be a mapping with data, student, losses, train, ...")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{recipe}: base: must be the name of a recipe or of a YAML file (given {reprlib.repr(base)})")
    neighbour = Path(recipe).parent / base
    if base not in recipe_names(shelf) and is_file(neighbour):
        base = str(neighbour)
    if base in (*within, recipe):
        raise UserError(f"{recipe}: base: {shortened(base)} has this recipe as its base; name another one")
    try:
        return merged(recipe_values(base, (*within, recipe), shelf), values)
    except UserError as error:
        raise UserError(f"{recipe}: base: {error}") from None


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of `values` updated with `changes`, section by section and key by key.

    `losses`, and a student or teacher that names a model, are replaced as a whole: no option of another model is left.
    """
    result = dict(values)
    for section, change in changes.items():
        before = values.get(section)
        whole = section == "losses" or (isinstance(change, dict) and "model" in change)
        both = isinstance(before, dict) and isinstance(change, dict)
        result[section] = before | change if both and not whole else change
    return result


def override(values: dict[str, Any], assignment: str) -> None:
    """Applies `section.key=value` to `values`, in place. Raises `UserError`."""
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
            raise UserError(f"`{shown}`: {parent} is a single value and has no key `{last}`")
        values = inner
    values[last] = parse_yaml(text, f"`{shown}`")


FIELDS = ("command", "stands for", "expected", "cost", "status")


def header(text: str) -> dict[str, str]:
    """The header comment of a recipe: its first line as `summary`, and the text of each of FIELDS, "" if missing."""
    lines = [line.removeprefix("#").strip() for line in header_lines(text)]
    texts = dict(line.split(":", 1) for line in lines if line.split(":")[0] in FIELDS)
    return {"summary": lines[0] if lines else ""} | {f.replace(" ", "_"): texts.get(f, "").strip() for f in FIELDS}


def header_lines(text: str) -> list[str]:
    """The comment lines at the top of a file."""
    return list(takewhile(lambda line: line.startswith("#"), text.splitlines()))
