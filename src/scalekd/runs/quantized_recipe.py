"""The recipe of a quantised run: that of the finished run, shorter and at a low rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from scalekd.common.errors import UserError
from scalekd.common.files import is_file
from scalekd.common.text import in_shell
from scalekd.config.losses import reads_teacher
from scalekd.config.recipe import Config, check_config
from scalekd.config.recipe_files import override
from scalekd.distill.rebuild import read_recipe
from scalekd.models.student_file import load_student
from scalekd.models.weights.card import read_card
from scalekd.transfer.tasks import TASKS

from .heads import with_heads

PTQ, LABELS, TEACHER = "ptq", "qat-labels", "qat"
WAYS = {
    PTQ: "int8, calibrated",
    LABELS: "int8, trained with labels only",
    TEACHER: "int8, trained with the teacher",
}
RATE = 0.01  # of the run's learning rate: the student is trained already


def run_to_quantise(run: Path, data_overrides: Sequence[str]) -> tuple[Config, nn.Module, dict[str, Any]]:
    """The recipe of a finished run, its student and the student's card. Raises `UserError`."""
    for task in TASKS.values():
        if is_file(run / task.weights):
            raise UserError(f"{run} holds a {task.trained}; only classifiers can be quantised")
    if not is_file(run / "recipe.yaml"):
        raise UserError(
            f"{run} is no run's folder (no recipe.yaml); `scalekd quantize` needs its recipe, data and student"
        )
    config = read_recipe(run)
    if config.quantize is not None:
        raise UserError(
            f"{run} is a quantised run itself, with {run / 'student.int8.onnx'}; quantise {config.quantize.run}"
        )
    student, card = load_student(run)
    if not card["classes"]:
        raise UserError(
            f"{run} has no classifier, because no loss of its run used logits, so the accuracy of an int8 file cannot be "
            f"measured. `scalekd export {in_shell(run)} --onnx` writes it in float32"
        )
    if card.get("embedding"):
        raise UserError(
            f"{run} has an embedding head, and int8 files have the classifier only. `scalekd export {in_shell(run)} --onnx` "
            "writes both in float32"
        )
    return _with(config, data_overrides), student, card


def quantized_recipe(
    config: Config, run: Path, way: str, calibration: str, images: int, epochs: int, overrides: Sequence[str]
) -> Config:
    """The recipe that trains the student of `run` by a way. Raises `UserError`.

    overrides: `section.key=value`, after everything else.
    """
    taught = [loss for loss in config.losses if reads_teacher(loss)]
    if way == TEACHER and not taught:
        raise UserError(f"{run} was trained without a teacher; `qat_labels` trains with its labels")
    if config.data.train is None and way == LABELS:
        raise UserError(f"{run} was trained without labels; `qat` trains with its teacher")
    values = with_heads(config, run).model_dump(mode="json")
    values["name"] = f"{config.name}-{way}"
    values["assistant"] = None
    values["quantize"] = {"run": str(run), "calibration": calibration, "images": images}
    values["student"] |= {"weights": str(run / "student.safetensors"), "prefix": None}
    values["train"] |= {
        "epochs": epochs,
        "eval_every": 1,
        "ema": None,
        "best_by": None,
        "patience": None,
        "export": "last",
        "compile": False,
        "sync_batchnorm": False,
        "precision": "float32",
    }
    values["optim"]["lr"] = config.optim.lr * RATE
    values["schedule"] = {"name": "cosine"}
    if way == LABELS:
        kept = {loss: options for loss, options in values["losses"].items() if loss not in taught}
        values |= {"teacher": None, "teachers": {}, "balance": None}
        values["losses"] = {loss: options | {"weight": 1.0} for loss, options in kept.items()} or _on_labels(run)
        values["data"] |= {"unlabelled": None, "unlabelled_limit": None}
    return _with_values(values, overrides)


def _on_labels(run: Path) -> dict[str, Any]:
    """The loss on labels of a student that had none."""
    return {"bce": {}} if read_card(run / "student.json").get("multi_label") else {"ce": {}}


def _with(config: Config, overrides: Sequence[str]) -> Config:
    return _with_values(config.model_dump(mode="json"), overrides) if overrides else config


def _with_values(values: dict[str, Any], overrides: Sequence[str]) -> Config:
    for text in overrides:
        override(values, text)
    return check_config(values, "quantize")
