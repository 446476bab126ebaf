"""Chooses losses for a situation from measured comparisons: `scalekd advise`, docs/how-to/advise.md.

The measurements are in evidence.json, which tools/evidence.py makes from docs/results.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from typing import Any

import yaml

from scalekd.common.errors import UserError
from scalekd.config.recipe import Config, load_recipe
from scalekd.cost.count import count_step
from scalekd.data.split import open_split
from scalekd.data.targets import one_each
from scalekd.distill.build import untrained
from scalekd.models.unfilled import unfilled

from .situation import FEATURES, FITTED, OWN, SCRATCH, Situation, situation

DEFAULT = "own-data"  # the row of a comparison that has the losses of the recipe own-data
SETS = "own-labels"  # the recipe for images with sets of labels
NONE = "no teacher"
ALL_IMAGES, LABELS_ONLY = ", all images", ", labels only"  # ends of a row's name: what it trained on
# How much less a measurement says if it differs in this; steps and labels count the logarithm of their ratio to base 4
KIND, START, TEACHER = 3.0, 3.0, 1.0


@functools.cache
def evidence() -> dict[str, Any]:
    text = (resources.files("scalekd") / "compare" / "evidence.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def advise(recipe: str, texts: Sequence[str], steps: int | None = None) -> dict[str, Any]:
    """The advice for a run of own-data or own-images, as plain data; the page of `scalekd advise` shows it.

    Args:
        recipe: own-data or own-images; own-labels takes the place of own-data if the images have sets of labels.
        texts: overrides of the recipe, such as data.train=photos.
        steps: of the run; by default those of the recipe's epochs.

    Returns:
        `recipe`, `overrides` in addition to `texts`, `expected` (gain in points of top-1, `ci95`, half of its 95 % interval, and
        `seeds`; None if nothing was measured), `rows` (the same of each method that was measured there, with its file),
        `measured` (the file of the chosen row and the situation; empty if nothing was measured), `differs` (from this one), `reasons`, `situation`, `cost` and `hours`.

    Raises:
        UserError: for a mistake in the recipe or the data, and without a teacher.
    """
    if steps is not None and steps < 1:
        raise UserError(f"`steps` {steps}: must be 1 or more")
    config = load_recipe(recipe, texts)
    if not config.all_teachers:
        raise UserError("the teacher is off: name one; advice is about what to learn from it")
    split = open_split(config.data)
    if recipe != DEFAULT:
        one_each(split.val.targets, "validation by nearest neighbours, without labelled training images,")
    elif split.multi_label:
        recipe = SETS
        config = load_recipe(recipe, texts)
    found, length = situation(config, split), []
    if steps is not None:
        epochs = max(1, round(steps * config.train.epochs / found.steps))
        warmup = config.schedule.warmup_epochs * epochs / config.train.epochs
        length = [f"train.epochs={epochs}", f"schedule.warmup_epochs={warmup:g}"]  # the same part of the steps
        found = replace(found, steps=found.steps // config.train.epochs * epochs)
    advice = _advice(config, found)
    own = ["teacher.head=null"] if found.teacher == OWN and config.teacher and config.teacher.fits_head else []
    overrides = [*own, *length, *advice["overrides"]]
    return {
        **advice,
        "recipe": recipe,
        "overrides": overrides,
        "situation": vars(found),
        "cost": _cost(load_recipe(recipe, [*texts, *overrides]), found, advice["losses"]),
    }


def _advice(config: Config, found: Situation) -> dict[str, Any]:
    if found.several:
        return _of_sets(config)
    return _label_free() if found.teacher == FEATURES else _labelled(found)


# ---------------------------------------------------------------- images with labels


def _labelled(found: Situation) -> dict[str, Any]:
    cell = nearest(found)
    rows = rows_for(cell, found)
    chosen, reasons = choose(rows)
    losses, plain = rows[chosen]["losses"], [] if rows[chosen]["balanced"] else ["balance=null"]
    return {
        "losses": list(losses),
        "overrides": [] if chosen == DEFAULT else [f"losses={in_yaml(losses)}", *plain],
        "expected": rows.get(chosen),
        "rows": rows,
        "measured": {"file": rows[chosen]["file"]} | {key: value for key, value in cell.items() if key != "rows"},
        "differs": differences(cell, found),
        "reasons": reasons,
    }


def nearest(found: Situation) -> dict[str, Any]:
    """The comparison whose situation is closest; among equally close ones that with own-data's losses, then the first."""
    fitting = [cell for cell in evidence()["gains"] if rows_for(cell, found)]
    return min(fitting, key=lambda cell: (distance(cell, found), DEFAULT not in rows_for(cell, found)))


def distance(cell: Mapping[str, Any], found: Situation) -> float:
    """How far a comparison's situation is from this one; 0 if they are the same."""
    return (
        KIND * (cell["kind"] != found.kind)
        + START * (cell["start"] != found.start)
        + TEACHER * (cell["teacher"] != found.teacher)
        + abs(math.log(found.steps / cell["steps"], 4))
        + abs(math.log(found.labels_per_class / (cell["labels"] / cell["classes"]), 4))
    )


def rows_for(cell: Mapping[str, Any], found: Situation) -> dict[str, dict[str, Any]]:
    """The rows that trained on what this person has: also on images without labels, or only on labelled ones."""
    ours, other = (ALL_IMAGES, LABELS_ONLY) if found.unlabelled else (LABELS_ONLY, ALL_IMAGES)
    if not any(name.endswith((ours, other)) for name in cell["rows"]):
        return {} if found.unlabelled else dict(cell["rows"])
    return {name.removesuffix(ours): row for name, row in cell["rows"].items() if name.endswith(ours)}


def choose(rows: Mapping[str, Mapping[str, Any]]) -> tuple[str, list[str]]:
    """The row to use, and why: the default if it is within the interval of the best one, else the best one."""
    best = max(rows, key=lambda name: rows[name]["gain"])
    default = rows.get(DEFAULT)
    shown = f"{best} has the largest gain there, {gain_text(rows[best])}"
    if default is None:
        reasons = [shown, "the losses of own-data were not measured there"]
    elif best == DEFAULT:
        reasons = [f"the losses of own-data have the largest gain there, {gain_text(default)}"]
    elif default["gain"] >= rows[best]["gain"] - rows[best]["ci95"]:
        reasons = [shown, f"the losses of own-data are within its interval: {gain_text(default)}"]
        best = DEFAULT
    else:
        reasons = [shown, f"the losses of own-data are below its interval: {gain_text(default)}"]
    if rows[best]["gain"] - rows[best]["ci95"] <= 0:
        reasons.append("the interval includes 0: it is not shown that a teacher helps; compare with no teacher")
    return best, reasons


def in_yaml(losses: Mapping[str, Any]) -> str:
    """Losses as the value of an override, on one line."""
    return yaml.safe_dump(losses, default_flow_style=True, sort_keys=False, width=1000).strip()


def gain_text(row: Mapping[str, Any]) -> str:
    return f"{row['gain']:+.1f} ± {row['ci95']:.1f} points ({row['seeds']} seeds)"


def differences(cell: Mapping[str, Any], found: Situation) -> list[str]:
    """How the measured situation differs from this one, in words."""
    texts = []
    if cell["kind"] != found.kind:
        texts.append(f"a {cell['kind']} was trained, yours is a {found.kind}")
    if cell["start"] != found.start:
        texts.append(
            f"the student was {'trained from scratch' if cell['start'] == SCRATCH else 'pre-trained'}, yours is not"
        )
    if cell["teacher"] != found.teacher:
        words = {OWN: "was trained on the same classes", FITTED: "had a classifier fitted to its features"}
        texts.append(f"the teacher {words[cell['teacher']]}")
    for name, here, there in (
        ("steps", found.steps, cell["steps"]),
        ("labelled images per class", found.labels_per_class, cell["labels"] / cell["classes"]),
    ):
        if max(here, there) > 2 * min(here, there):
            texts.append(f"{there:,.0f} {name}, yours are {here:,.0f}")
    return texts


# ---------------------------------------------------------------- images with sets of labels


def _of_sets(config: Config) -> dict[str, Any]:
    return {
        "losses": list(config.losses),
        "overrides": [],
        "expected": None,
        "rows": {},
        "measured": {},
        "differs": [],
        "reasons": [
            "no comparison on images with several labels was measured, so nothing says which losses help or how much",
            "own-labels is the recipe that the documentation recommends: binary cross entropy, and the teacher's features",
            "the teacher's logits can teach too, with a classifier for your labels: teacher.head=fit "
            "losses.kd.probabilities=sigmoid",
        ],
    }


# ---------------------------------------------------------------- images without labels


def _label_free() -> dict[str, Any]:
    measured = evidence()["label_free"]
    supervised = {
        f"{cell['labels'] / cell['classes']:.0f}": cell["baseline"]
        for cell in evidence()["gains"]
        if any(row["file"].startswith("docs/results/labels/") for row in cell["rows"].values())
    }
    compared = ", ".join(
        f"{shots} per class {top1:.1f} % ({supervised[shots]:.1f} %)"
        for shots, top1 in measured["top1"].items()
        if shots in supervised
    )
    return {
        "losses": ["scalekd"],
        "overrides": [],
        "expected": None,
        "rows": {},
        "measured": {"file": measured["file"], "top1": measured["top1"], "supervised": supervised},
        "differs": [],
        "reasons": [
            "without labels only losses on features can be used; other losses were not compared in this situation",
            f"a CNN saw a DINOv2 teacher for {measured['steps']} steps; top-1 of a linear classifier on its features by the "
            f"number of labels, and of a student that was trained on these labels alone: {compared}",
            "label a few images per class, and own-data can use both kinds",
        ],
    }


# ---------------------------------------------------------------- what it costs


def _cost(config: Config, found: Situation, losses: Sequence[str]) -> dict[str, Any]:
    """The arithmetic that the teacher adds, counted for this pair, and the measured time of the dearest of the losses."""
    result: dict[str, Any] = {}
    if config.teacher is not None:
        with unfilled():
            pair = untrained(config, max(found.classes, 2), {"ce": {}, "fd": {}})
        parts = count_step(pair, config, max(found.classes, 2), 2)["parts"]
        student = parts["student"]["forward"] + parts["student"]["backward"]
        result["gmacs"] = {"teacher": parts["teacher"]["forward"], "student": student}
        result["times"] = 1 + parts["teacher"]["forward"] / student
    times = {
        name: [cost["over_floor"][name] for cost in evidence()["costs"] if name in cost["over_floor"]]
        for name in losses
    }
    measured = {name: values for name, values in times.items() if values}
    if measured:
        name = max(measured, key=lambda name: max(measured[name]))
        values = measured[name]
        result["losses"] = {"method": name, "over_floor": [min(values), max(values)], "files": len(values)}
    return result
