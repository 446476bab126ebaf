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
from scalekd.models.options import Embedding, Model


class Card(BaseModel):
    """The fields of a student's card that are needed to use it. The file has more."""

    model_config = ConfigDict(allow_inf_nan=False, protected_namespaces=())
    model: str
    kwargs: dict[str, Any]
    classes: list[str]  # empty for a backbone without a classifier
    image_size: tuple[Pixels, Pixels]
    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]
    interpolation: Interpolation
    crop_pct: CropShare
    embedding: Embedding | None = None  # the head that gives the embedding; None: the pooled features are it
    multi_label: bool = False  # whether an image may have several classes
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None  # probability from which on an image has a class

    @model_validator(mode="after")
    def _usable(self) -> Card:
        Model(model=self.model, kwargs=self.kwargs)
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise ValueError("mean and std must each have one value or three")
        return self


def read_card(file: Path) -> dict[str, Any]:
    """A student's card. Raises `UserError` if it is not valid, or its model is not a timm model."""
    try:
        text = file.read_text()
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a valid student card: {first_line(error)}") from None
    return checked_card(text, str(file))


def checked_card(text: str, where: str) -> dict[str, Any]:
    """The card in a text. where: the file it is from. Raises `UserError` as `read_card`."""
    try:
        card: dict[str, Any] = json.loads(text)
        Card.model_validate(card)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{where} is not a valid student card: {shortened(f'{key}: ' * bool(key) + first['msg'])}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not a valid student card: {first_line(error)}") from None
    return card


def short_floats(values: torch.Tensor) -> list[float]:
    """The shortest decimals with the same float32 values: 0.485 instead of 0.48500001430511475."""
    return [float(str(v)) for v in values.flatten().cpu().numpy()]
