"""The metadata file next to exported weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from scalekd.common.errors import UserError, first_line
from scalekd.common.sections import CropShare, Interpolation, Pixels
from scalekd.common.text import shortened
from scalekd.models.options import Model


class Card(BaseModel):
    """What a student's card must have, to be used without surprises; it has more."""

    model_config = ConfigDict(allow_inf_nan=False, protected_namespaces=())
    model: str
    kwargs: dict[str, Any]
    classes: list[str]  # none of a backbone without a classifier
    image_size: tuple[Pixels, Pixels]
    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]
    interpolation: Interpolation
    crop_pct: CropShare

    @model_validator(mode="after")
    def _usable(self) -> Card:
        Model(model=self.model, kwargs=self.kwargs)
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise ValueError("mean and std are of one channel or of three")
        return self


def read_card(file: Path) -> dict[str, Any]:
    """Raises `UserError` for a file that is no card, or names anything but a model of timm's and its shape."""
    try:
        card = json.loads(file.read_text())
        Card.model_validate(card)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{file} is not a student's card: {shortened(f'{place}: ' * bool(place) + first['msg'])}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not a student's card: {first_line(error)}") from None
    return card


def short_floats(values: torch.Tensor) -> list[float]:
    """0.485 and not 0.48500001430511475: the shortest decimals that are the same float32."""
    return [float(str(v)) for v in values.flatten().cpu().numpy()]
