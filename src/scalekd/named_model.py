"""A timm model that a command line names, with its weights proved loaded."""

from __future__ import annotations

import timm
from pydantic import ValidationError
from torch import nn

from .config import Model
from .errors import UserError, first_line, nearest
from .loaded import Loaded, Trained, trained
from .models import build_model


def timm_model(name: str, weights: str, size: tuple[int, int], way_out: str) -> tuple[nn.Module, Loaded, Trained]:
    """The model of three channels, where its weights are from, and whether anyone trained them.

    weights: as in a recipe. size: height and width in pixels. way_out: what is told where the weights are none or not
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
        raise UserError(f"{told}\n{way_out}") from None
    found = trained(loaded)
    if found.status == "fail":
        raise UserError(f"{found.told}\n{way_out}")
    return model, loaded, found
