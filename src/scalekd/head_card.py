"""What `scalekd head` wrote, read back and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from .config import FIT
from .errors import UserError, first_line, shortened
from .files import is_file
from .weights import State, sha256_of


class HeadCard(BaseModel):
    """What head.json must have for its head to be used; it has more, for people."""

    model_config = ConfigDict(allow_inf_nan=False, protected_namespaces=())
    model: str
    kwargs: dict[str, Any]
    sha256: str  # of the backbone: `backbone_sha256`
    prefix: str | None = None  # what stood before its names in the file; not told by older versions
    weights: str  # what the backbone was loaded from
    channels: int
    image_size: tuple[int, int]
    mean: list[float]
    std: list[float]
    classes: Annotated[list[str], Field(min_length=1)]
    labels: int
    head_sha256: str  # of head.safetensors
    crop_pct: float
    interpolation: str
    validation: dict[str, dict[str, float]]  # before and after the temperature


def read_head(folder: Path, where: str) -> tuple[HeadCard, State]:
    """The card and {"weight": (C, D), "bias": (C,)} that `scalekd head` wrote. Raises `UserError` that names `where`."""
    if str(folder) == FIT:
        raise UserError(
            f"{where}: `{FIT}` is for `scalekd train`, which fits the head first; here name the folder of a head that "
            "is there: a run's own, or what `scalekd head` wrote"
        )
    file, card_file = folder / "head.safetensors", folder / "head.json"
    if not is_file(file) or not is_file(card_file):
        raise UserError(f"{where}: no head.safetensors with its head.json in {folder}; `scalekd head` makes them")
    try:
        card = HeadCard.model_validate_json(card_file.read_bytes())
        tensors = load_file(file)
    except ValidationError as error:
        wrong = "; ".join(_field_told(dict(e)) for e in error.errors()[:5])
        raise UserError(f"{where}: {card_file} is not as `scalekd head` writes it: {wrong}; fit it anew") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{where}: {folder} holds no head that can be used: {first_line(error)}") from None
    if card.head_sha256 != sha256_of(file):
        raise UserError(
            f"{where}: {file} is not the file that {card_file} tells of: it has another sha256; fit it anew"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    width = shapes.get("weight", (0,))[-1]
    if shapes != {"weight": (len(card.classes), width), "bias": (len(card.classes),)}:
        raise UserError(f"{where}: {file} holds {shapes}, not a weight and a bias for {len(card.classes)} classes")
    return card, tensors


def _field_told(error: dict[str, Any]) -> str:
    place = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"{place} is missing"
    return shortened(f"{place}: {error['msg']}" if place else str(error["msg"]))
