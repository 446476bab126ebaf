"""The result of `scalekd advise` on the screen."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from scalekd.common.text import in_shell, printable

from .advise import DEFAULT, SETS, gain_text
from .situation import FEATURES, FITTED, OWN

TEACHERS = {
    OWN: "a teacher trained on these classes",
    FITTED: "a teacher with a classifier fitted to its features",
    FEATURES: "the features of a teacher",
}
MOST_ROWS = 5  # of a comparison


def show(advice: dict[str, Any], console: Console) -> None:
    sections = [
        ("You have", [_situation(advice["situation"])]),
        ("Train with", [advice["command"]]),
        ("Why", advice["reasons"]),
        ("Expected", _expected(advice)),
        ("Measured", _measured(advice)),
        ("Cost", _cost(advice)),
        ("Then check it on your own images", [advice["check"]]),
    ]
    for title, lines in sections:
        if lines:
            text = "\n".join(f"  {printable(line)}" for line in lines)
            console.print(f"{title}\n{text}\n", markup=False, highlight=False, soft_wrap=True)


def _situation(found: dict[str, Any]) -> str:
    images = f"{found['labels']:,} labelled images of {found['classes']:,} classes" if found["labels"] else ""
    images += ", several on an image" * found["several"]
    more = f"{found['unlabelled']:,} images without labels" if found["unlabelled"] else ""
    return (
        f"{' and '.join(filter(None, (images, more)))}; a {found['kind']} {_start(found['start'])}; "
        f"{TEACHERS[found['teacher']]}; {found['steps']:,} steps"
    )


def _start(start: str) -> str:
    return "with pre-trained weights" if start == "pre-trained" else start


def _expected(advice: dict[str, Any]) -> list[str]:
    if advice["expected"] is None:
        return ["unknown: no comparison measured this"]
    differs = f" But there {'; '.join(advice['differs'])}." if advice["differs"] else ""
    return [
        f"{gain_text(advice['expected'])} of top-1 more than without a teacher, as in the comparison below.{differs}"
    ]


def _measured(advice: dict[str, Any]) -> list[str]:
    cell = advice["measured"]
    if not cell:
        return []
    ranked = sorted(advice["rows"], key=lambda name: -advice["rows"][name]["gain"])
    shown = ranked[:MOST_ROWS] + [DEFAULT] * (DEFAULT in ranked[MOST_ROWS:])
    files = list(dict.fromkeys([cell["file"], *(advice["rows"][name]["file"] for name in shown)]))
    lines = [f"{file} ({k})" for k, file in enumerate(files, 1)] if len(files) > 1 else list(files)
    if "steps" in cell:
        lines.append(
            f"a {cell['kind']} {_start(cell['start'])}, {cell['labels']:,} labelled images of {cell['classes']} classes, "
            f"{TEACHERS[cell['teacher']]}, {cell['steps']:,} steps; no teacher {cell['baseline']:.1f} %"
        )
    for name in shown:
        mark = f" ({files.index(advice['rows'][name]['file']) + 1})" * (len(files) > 1)
        lines.append(f"{name:20} {gain_text(advice['rows'][name])}{mark}")
    return lines


def _cost(advice: dict[str, Any]) -> list[str]:
    cost = advice["cost"]
    lines = []
    if "times" in cost:
        gmacs = cost["gmacs"]
        lines.append(
            f"{cost['times']:.1f} times the arithmetic of training without a teacher: {gmacs['teacher']:.2g} GMACs an image "
            f"for the teacher and {gmacs['student']:.2g} for the student, counted for your models"
        )
    if "losses" in cost:
        low, high = cost["losses"]["over_floor"]
        lines.append(
            f"the losses: {low:.2f} to {high:.2f} times the time of such a step ({cost['losses']['method']} in "
            f"{cost['losses']['files']} files steps-*.json of docs/results/performance)"
        )
    return [*lines, f"hours: {advice['plan']}"]


def commands(recipe: str, given: list[str], overrides: list[str]) -> dict[str, str]:
    """The commands that follow the advice. given: the person's options and overrides, one word each."""
    words = [in_shell(word) for word in (*given, *overrides)]
    shared = [in_shell(word) for word in (*given, *(o for o in overrides if not o.startswith(("losses=", "balance="))))]
    check = ["scalekd compare own-ladder", *shared, "--methods 'KD,DIST,DIST with FD'"]
    if recipe == SETS:
        check = ["scalekd compare own-labels-ladder", *shared, "--methods 'KD,FD,KD with FD'"]
    elif recipe != DEFAULT:
        check = [f"scalekd probe runs/{recipe} --data LABELLED --shots 1,10,all"]
    return {
        "command": " ".join(["scalekd train", recipe, *words]),
        "plan": " ".join(["scalekd plan", recipe, *words]),
        "check": " ".join(check),
    }
