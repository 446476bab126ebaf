"""Building timm models, and proving that their weights were loaded."""

from __future__ import annotations

import timm
from pydantic import ValidationError
from torch import nn

from scalekd.common.errors import UserError, first_line, nearest

from . import mixer  # noqa: F401 - adds a name to timm's
from .create import build_plain
from .fitted_head import build_with_head
from .options import Model
from .weights.trained import Loaded, Verdict, trained


def build_model(
    spec: Model, *, channels: int, image_size: tuple[int, int], classes: int | None, where: str
) -> tuple[nn.Module, Loaded]:
    """`timm.create_model` with the recipe's keyword arguments, weights checked.

    classes: the width of the head; None keeps the one that the pre-trained weights came with. Weights of another
    class count: a student gets a new head, which `Loaded.head` says; a teacher keeps the head of its file, or is
    without one as the file is. `spec.head`: the classifier that `scalekd head` fitted.
    Raises `UserError`, naming `where` (student or teacher), for unknown arguments and for weights that do not fit.
    """
    build = build_plain if spec.head is None else build_with_head
    return build(spec, channels=channels, image_size=image_size, classes=classes, where=where)


def timm_model(name: str, weights: str, size: tuple[int, int], remedy: str) -> tuple[nn.Module, Loaded, Verdict]:
    """The model of three channels, where its weights are from, and whether anyone trained them.

    weights: as in a recipe. size: height and width in pixels. remedy: what is told where the weights are none or not
    trained. Raises `UserError`, which leaves it to the caller to say for which of his models.
    """
    try:
        spec = Model(model=name, weights=weights)
    except ValidationError:
        hint = nearest(name.split(".")[0], timm.list_models()) if name else ""
        raise UserError(
            f"no timm model, and no exported student is there.{hint}\n"
            "Write a timm name, NAME=FILE for weights in a file, or a run's folder."
        ) from None
    try:
        model, loaded = build_model(spec, channels=3, image_size=size, classes=None, where="teacher")
    except UserError as error:
        told = first_line(error).removeprefix("teacher").lstrip(":. ")
        raise UserError(f"{told}\n{remedy}") from None
    verdict = trained(loaded)
    if verdict.status == "fail":
        raise UserError(f"{verdict.text}\n{remedy}")
    return model, loaded, verdict
