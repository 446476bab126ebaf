"""Leaves out damaged values of a run's files, so that a report shows the others and says what is missing.

Files may be cut off, edited or of another version: a value of a wrong type, NaN or a huge number would otherwise end the
report in a traceback, or show nonsense.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scalekd.common.errors import UserError, first_line
from scalekd.common.files import is_file
from scalekd.common.set_figures import SET_FIGURES
from scalekd.heads.retrieval import RETRIEVAL_FIGURES
from scalekd.models.weights.card import read_card
from scalekd.transfer.exported_model import read_card as read_transfer_card
from scalekd.transfer.tasks import TASKS, TaskName

from .curves import TOP1
from .svg import finite

Check = Callable[[Any], bool]
FIGURES = TOP1 | RETRIEVAL_FIGURES | SET_FIGURES | TASKS["detection"].figures | TASKS["segmentation"].figures


def _count(value: Any) -> bool:
    return finite(value) and not isinstance(value, bool) and 0 <= value < 2**53


def _number(value: Any) -> bool:
    return finite(value) and not isinstance(value, bool) and abs(value) < 1e30


def _share(value: Any) -> bool:
    return _count(value) and value <= 100


def _positive(value: Any) -> bool:
    return _count(value) and value >= 1


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _mappings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, dict) for item in value.values())


def _options(value: Any) -> bool:
    return isinstance(value, dict) and all(item is None or isinstance(item, dict) for item in value.values())


def _class_figures(value: Any) -> bool:
    return isinstance(value, dict) and all(item is None or _number(item) for item in value.values())


def _class_rows(value: Any) -> bool:
    def fits(row: Any) -> bool:
        figures = [row.get(key) for key in ("iou", "accuracy")] if isinstance(row, dict) else [""]
        return all(f is None or _number(f) for f in figures) and _text(row.get("class")) and _count(row.get("pixels"))

    return isinstance(value, list) and all(map(fits, value))


RESULTS: dict[str, Check] = {
    **dict.fromkeys(FIGURES, _share),
    **dict.fromkeys((f"best_{key}" for key in FIGURES), _number),
    **dict.fromkeys(("step", "steps", "epoch", "epochs", "seconds", "elapsed_s", "left_s", "pixels"), _count),
    **dict.fromkeys(("images", "neighbours"), _positive),
    **dict.fromkeys(("queries", "left_out"), _count),
    "ended_early": _text,
    **dict.fromkeys(("images_per_s", "data_share", "teacher_share", "bad_images", "classes_counted"), _count),
    **dict.fromkeys(("lr", "loss", "best"), _number),
    "losses": _mapping,
    "classes": _class_figures,
    "per_class": _class_rows,
}
MADE: dict[str, Check] = {"weights": _mappings}
KNOWN: dict[str, Check] = {"facts": _mapping}
TAUGHT: dict[str, Check] = {"teacher": _text, "losses": _options}  # in a student's card
SECTIONS = ("data", "augment", "student", "teacher", "train", "optim", "schedule", "backbone", "detector", "segmenter")
RECIPE: dict[str, Check] = {
    **dict.fromkeys(SECTIONS, _mapping),
    "teachers": _mappings,
    "losses": _options,
    "name": _text,
}
MODEL: dict[str, Check] = {"model": _text, "top1": _share}
BUDGET: dict[str, Check] = dict.fromkeys(("epochs", "iterations", "batch_size"), _count)


def without_damage(
    values: Mapping[str, Any], checks: Mapping[str, Check], where: str
) -> tuple[dict[str, Any], list[str]]:
    """`values` without those that fail their check, and a line if there are such; None stands for no value."""
    wrong = [key for key, check in checks.items() if values.get(key) is not None and not check(values[key])]
    kept = {key: value for key, value in values.items() if key not in wrong}
    return kept, [f"{where} has unusable values, which are left out: {', '.join(wrong)}."] if wrong else []


def intact_json(file: Path, checks: Mapping[str, Check]) -> tuple[dict[str, Any], list[str]]:
    """The JSON object in `file` without damaged values, and lines on what is left out; empty without the file."""
    if not is_file(file):
        return {}, []
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        return {}, [f"{file} is damaged and left out: {first_line(error)}."]
    return without_damage(values, checks, str(file))


def intact_events(events: list[dict[str, Any]], where: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The events of a log without damaged values, and a line if there are such."""
    cleaned = [without_damage(event, RESULTS, where) for event in events]
    wrong = sum(bool(lines) for _, lines in cleaned)
    return [event for event, _ in cleaned], [
        f"{where}: {wrong} events have unusable values, which are left out."
    ] * bool(wrong)


def intact_card(file: Path, task: TaskName | None) -> tuple[dict[str, Any], list[str]]:
    """The card of the deployed model, which may not be exported yet, and a line if it is damaged."""
    if not is_file(file):
        return {}, []
    try:
        if task is None:
            card = read_card(file)
            return without_damage(card, TAUGHT, str(file))
        values, lines = intact_json(file, {})
        return (read_transfer_card(file, task) if "sha256" in values else {}), lines
    except UserError as error:
        return {}, [f"{first_line(error)}; it is left out."]


def check_sections(recipe: Any, where: str) -> None:
    """Raises `UserError` for a recipe whose sections are not of the right kind: without them there is nothing to show."""
    wrong = "" if isinstance(recipe, dict) else "it must be a mapping with data, student and other sections"
    if not wrong:
        models = {key: recipe.get(key) for key in ("student", "teacher", "backbone")} | (
            _usable(recipe.get("teachers"))
        )
        sections = [("", recipe, RECIPE), *((f"{key}.", _usable(value), MODEL) for key, value in models.items())]
        sections.append(("train.", _usable(recipe.get("train")), BUDGET))
        bad = [
            f"{prefix}{key}"
            for prefix, values, checks in sections
            for key, check in checks.items()
            if values.get(key) is not None and not check(values[key])
        ]
        wrong = f"unusable values at {', '.join(bad)}" if bad else ""
    if wrong:
        raise UserError(f"{where} is not a recipe: {wrong}. Restore the file from a copy of the run")


def _usable(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
