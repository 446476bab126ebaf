"""Builds the model that a recipe section or a command-line argument describes, with checked weights."""

from __future__ import annotations

from pydantic import ValidationError
from torch import nn

from scalekd.common.errors import UserError, first_line

from . import added  # noqa: F401 - adds models to timm
from .create import build_plain
from .fitted_head import build_with_head
from .names import models_like
from .options import Model
from .weights.trained import Loaded, Verdict, trained


def build_model(
    spec: Model, *, channels: int, image_size: tuple[int, int], classes: int | None, where: str
) -> tuple[nn.Module, Loaded]:
    """The timm model of `spec` with its weights, and where they came from.

    With `spec.head` the classifier is the one that `scalekd head` fitted. If the weights have another number of classes,
    a student gets a new head, described in `Loaded.head`; a teacher keeps the head of its file, if the file has one.

    Args:
        classes: width of the head; None keeps that of the pre-trained weights.
        where: recipe key of the model, such as `teacher`, for errors.

    Raises `UserError` for unknown arguments and for weights that do not fit.
    """
    build = build_plain if spec.head is None else build_with_head
    return build(spec, channels=channels, image_size=image_size, classes=classes, where=where)


def timm_model(name: str, weights: str, size: tuple[int, int], remedy: str) -> tuple[nn.Module, Loaded, Verdict]:
    """A timm model with three input channels, where its weights came from, and whether they are trained.

    weights: as in a recipe. size: (height, width) in pixels. remedy: the line that ends an error about the weights.
    Raises `UserError`, also for untrained weights. The message does not name the model; the caller adds that.
    """
    try:
        spec = Model(model=name, weights=weights)
    except ValidationError:
        hint = models_like(name) if name else ""
        raise UserError(
            f"this is neither a timm model nor an exported student.{hint}\n"
            "Use a timm name, NAME=FILE for weights in a file, or a run's folder."
        ) from None
    try:
        model, loaded = build_model(spec, channels=3, image_size=size, classes=None, where="teacher")
    except UserError as error:
        message = first_line(error).removeprefix("teacher").lstrip(":. ")
        raise UserError(f"{message}\n{remedy}") from None
    verdict = trained(loaded)
    if verdict.status == "fail":
        raise UserError(f"{verdict.text}\n{remedy}")
    return model, loaded, verdict
