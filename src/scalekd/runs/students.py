"""Exports the student of a run (`scalekd export`) and evaluates exported students (`scalekd evaluate`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

from scalekd.common import parallel
from scalekd.common.errors import UserError, first_line
from scalekd.common.files import is_file, reject_links
from scalekd.common.out_of_memory import explain_out_of_memory
from scalekd.common.sections import height_and_width
from scalekd.common.set_figures import class_table, figures_of
from scalekd.data.batches import Images, eval_batches
from scalekd.data.description import of_source, tell_data
from scalekd.data.options import Augment, Data
from scalekd.data.sources.open import evaluated_part, open_source, parts_of
from scalekd.data.split import class_difference, same_classes
from scalekd.data.targets import are_sets
from scalekd.data.transforms import Transform, eval_transform
from scalekd.distill.evaluate import evaluate
from scalekd.distill.label_sets import scores_of
from scalekd.distill.rebuild import read_recipe
from scalekd.distill.run import DistillationRun
from scalekd.models.inputs import card_statistics
from scalekd.models.int8.file import INT8
from scalekd.models.open_student import open_student
from scalekd.models.student_file import create_student, export_onnx, export_student
from scalekd.models.weights.card import read_card, short_floats
from scalekd.train import checkpoint
from scalekd.train.hardware import workers_for
from scalekd.train.run import provenance
from scalekd.transfer.tasks import TASKS


def student_card(run: DistillationRun) -> dict[str, Any]:
    """The metadata that is needed to use the exported student: how to build it, its classes, and its preprocessing."""
    config = run.config
    return {
        "model": config.student.model,
        "kwargs": run.loaded["student"].kwargs,
        "classes": run.classes if run.has_classifier else [],
        **({"multi_label": True} if run.multi_label else {}),
        **({"embedding": config.student.embedding.complete()} if config.student.embedding else {}),
        **({"best_by": run.chooser} if config.train.best_by else {}),
        "image_size": list(height_and_width(config.data.image_size)),
        "mean": short_floats(run.distiller.student_mean),
        "std": short_floats(run.distiller.student_std),
        "interpolation": config.augment.interpolation,
        "crop_pct": config.augment.crop_pct,
        "teacher": " + ".join(spec.model for spec in config.all_teachers.values()) or None,
        "losses": config.losses,
        "provenance": provenance(run),
    }


class Exported(NamedTuple):
    """What `export_run` wrote, and the checkpoint's figures."""

    figures: dict[str, float]  # top1, or map with sets of labels; the one that chose best.pt; threshold
    best_by: str  # the key of that one
    differences: dict[Path, float]  # file -> largest absolute difference of its outputs from the student's


def export_run(folder: Path, which: str, onnx: bool) -> Exported:
    """Writes student.safetensors, its card and optionally student.onnx from a run's `best` or `last` checkpoint.

    Needs neither the run's data nor its teacher. Raises `UserError`.
    """
    reject_links(folder)
    state_file, card_file = folder / f"{which}.pt", folder / "student.json"
    if not card_file.is_file() or not state_file.is_file():
        raise UserError(
            f"{folder} has no {which} checkpoint to export; choose the folder of a run that has reached a validation"
        )
    if is_file(folder / INT8) and is_file(folder / "recipe.yaml") and read_recipe(folder).quantize is not None:
        raise UserError(
            f"{folder} is a quantised run: its files are {INT8}, and student.safetensors with the weights before rounding"
        )
    state, card = checkpoint.load(state_file), read_card(card_file)
    student = create_student(card, card_file)
    key = "map" if card.get("multi_label") else "top1"
    try:
        figures = state["progress"]["history"][-1] if which == "last" else state
        best_by = str(card.get("best_by") or key)
        made = {name: float(figures[name]) for name in (key, best_by, *["threshold"] * (key == "map"))}
        student.load_state_dict(state["deployed" if which == "last" else "student"])
        step = int(state["progress"]["step"] if which == "last" else state["step"])
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"{state_file} is not a checkpoint of the student in {card_file}: {first_line(error)}"
        ) from None
    card = {name: value for name, value in card.items() if name != "sha256"} | made
    card |= {"exported": which, "exported_step": step}
    file = folder / "student.safetensors"
    differences = {file: export_student(student, file, card)}
    if onnx:
        differences[folder / "student.onnx"] = export_onnx(student, folder / "student.onnx", card)
    return Exported(made, best_by, differences)


def opened(path: Path, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """`open_student`, with an error for the folder of a detector or segmenter. Raises `UserError`."""
    for task in TASKS.values():
        if path.is_dir() and is_file(path / task.weights):
            raise UserError(
                f"{path} holds a {task.trained}; use `{task.command} predict` and `{task.command} evaluate`"
            )
    return open_student(path, device)


def validation_transform(card: Mapping[str, Any]) -> Transform:
    """The transform of the validation images of a student's run, from its card: PIL image -> uint8 (C, H, W)."""
    data = Data.model_validate({"image_size": card["image_size"], "channels": len(card["mean"])})
    return eval_transform(data, Augment(interpolation=card["interpolation"], crop_pct=card["crop_pct"]))


def check_kind(card: dict[str, Any], several: bool) -> None:
    """Raises `UserError` if the labels of `data`, sets if `several`, are not of the kind that the student was trained on."""
    if several != bool(card.get("multi_label")):
        kinds = ("sets of labels", "one class per image")
        theirs, ours = kinds if card.get("multi_label") else kinds[::-1]
        raise UserError(f"`data` has {ours}, and the student was trained on {theirs} (`scalekd docs labels`)")


def evaluate_student(
    path: Path, source_text: str, device_name: str | None, console: Console
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Top-1 and top-5 (%), loss and number of images of an exported student on a data source; and the data described.

    For a student of sets of labels: `figures_of` at the threshold of its card, and `classes`, the `class_table`. Raises
    `UserError` if the classes or the kind of labels differ, and if the student's outputs are not finite.
    """
    device = parallel.pick_device(device_name)
    student, card = opened(path, device)
    if not card["classes"]:
        raise UserError(
            f"{path} has no classifier, because no loss of its run used logits. "
            "Measure its embeddings with `scalekd evaluate --retrieval`, or its features with `scalekd probe`"
        )
    if len(parts_of(source_text)) > 1:
        raise UserError(
            f"`data`: {source_text} has several splits; name one of them, such as {evaluated_part(source_text)}"
        )
    source = open_source(source_text, "`data`", card["classes"])
    check_kind(card, are_sets(source.targets))
    if not same_classes(card["classes"], source.classes):
        raise UserError(
            f"`data` has other classes than the student: {class_difference(card['classes'], source.classes)}"
        )
    images = Images(source, range(len(source)), validation_transform(card), None)
    mean, std = card_statistics(card, device)
    described = of_source(source, source_text)
    tell_data(console, described)
    with explain_out_of_memory(device, "Try the CPU: set `device` to cpu."):
        batches = eval_batches(images, min(256, len(images)), workers_for("auto", device), device.type == "cuda")
        found: dict[str, Any]
        if card.get("multi_label"):
            scores = scores_of(student, batches, mean, std, device)
            figures = figures_of(scores, card.get("threshold"))
            found = figures | {"classes": class_table(scores, card["classes"], figures["threshold"])}
        else:
            found = evaluate(student, batches, mean, std, device)
    if not math.isfinite(found["loss"]):
        raise UserError(
            f"{path}: the student's outputs are not finite, so its accuracy has no meaning. Its run diverged or its file is "
            "damaged: train it again, or export another checkpoint with `scalekd export`"
        )
    return found, described
