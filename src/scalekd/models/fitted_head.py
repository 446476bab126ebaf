"""Reads a head that `scalekd head` wrote, checks it and puts it on its backbone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from scalekd.common.errors import UserError, first_line
from scalekd.common.files import is_file, reject_links
from scalekd.common.text import shortened

from . import added  # noqa: F401 - adds models to timm
from .create import build_plain, create, resolve
from .inputs import statistics
from .options import FIT, Model
from .weights.file import ENDINGS
from .weights.match import (
    State,
    classifier,
    load_weights,
    sha256_of,
)
from .weights.trained import Loaded, backbone_sha256


class HeadCard(BaseModel):
    """The fields of head.json that are needed to use the head. The file has more."""

    model_config = ConfigDict(allow_inf_nan=False, protected_namespaces=())
    model: str
    kwargs: dict[str, Any]
    sha256: str  # of the backbone: `backbone_sha256`
    prefix: str | None = None  # in front of its tensor names in the file; older versions did not write it
    weights: str  # source of the backbone's weights
    channels: int
    image_size: tuple[int, int]
    mean: list[float]
    std: list[float]
    classes: Annotated[list[str], Field(min_length=1)]
    multi_label: bool = False  # whether an image may have several classes
    labels: int
    head_sha256: str  # of head.safetensors
    crop_pct: float
    interpolation: str
    validation: dict[str, dict[str, float]]  # before and after the temperature


def read_head(folder: Path, where: str) -> tuple[HeadCard, State]:
    """The card and the tensors {"weight": (C, D), "bias": (C,)} of a head. Raises `UserError` that begins with `where`."""
    if str(folder) == FIT:
        raise UserError(
            f"{where}: `{FIT}` works only in `scalekd train`; set it to the folder of a fitted head, from a run or from "
            "`scalekd head`"
        )
    if is_file(folder):
        raise UserError(f"{where}: {folder} is a file; a published classifier must end in {' or '.join(ENDINGS[:2])}")
    file, card_file = folder / "head.safetensors", folder / "head.json"
    if not is_file(file) or not is_file(card_file):
        raise UserError(
            f"{where}: {folder} has no head.safetensors with its head.json; create them with `scalekd head`"
        )
    reject_links(folder)
    try:
        card = HeadCard.model_validate_json(card_file.read_bytes())
        tensors = load_file(file)
    except ValidationError as error:
        faults = "; ".join(_fault(dict(e)) for e in error.errors()[:5])
        raise UserError(f"{where}: {card_file} is damaged: {faults}; fit the head again with `scalekd head`") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{where}: cannot read the head in {folder}: {first_line(error)}") from None
    if card.head_sha256 != sha256_of(file):
        raise UserError(
            f"{where}: {file} does not match the sha256 in {card_file}; fit the head again with `scalekd head`"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    width = shapes.get("weight", (0,))[-1]
    if shapes != {"weight": (len(card.classes), width), "bias": (len(card.classes),)}:
        raise UserError(
            f"{where}: {file} has tensors {shapes}, but needs a weight and a bias for {len(card.classes)} classes"
        )
    return card, tensors


def _fault(error: dict[str, Any]) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"{key} is missing"
    return shortened(f"{key}: {error['msg']}" if key else str(error["msg"]))


def build_with_head(
    spec: Model, *, channels: int, image_size: tuple[int, int], classes: int | None, where: str
) -> tuple[nn.Module, Loaded]:
    """`build_model` with a fitted head. Raises `UserError` if the head was fitted for another backbone or input."""
    folder = resolve(str(spec.head))
    card, tensors = read_head(folder, f"{where}.head")
    count = len(card.classes)

    def refuse_unless(same: bool, what: str, theirs: object, ours: object, remedy: str) -> None:
        if not same:
            raise UserError(
                f"{where}.head: {spec.head} was fitted for {what} {theirs}, but this recipe has {ours}.\n{remedy}"
            )

    again = "Or fit another head with `scalekd head`"
    same = card.model.split(".")[0] == spec.model.split(".")[0]  # the checksum tells tags apart
    refuse_unless(same, "the backbone", card.model, spec.model, f"Set {where}.model={card.model}. {again}")
    ours = {k: v for k, v in spec.kwargs.items() if k != "num_classes" or v not in (0, count)}
    refuse_unless(card.kwargs == ours, "kwargs", card.kwargs, ours, f"Set {where}.kwargs to the same values. {again}")
    refuse_unless(
        classes in (None, count), "a number of classes of", count, classes, "Fit a head for the data's classes"
    )
    refuse_unless(card.channels == channels, "data.channels", card.channels, channels, again)
    size = list(card.image_size)
    refuse_unless(
        size == list(image_size), "images of", size, list(image_size), f"Set {where}.image_size={size}. {again}"
    )

    backbone, loaded = build_plain(
        spec.model_copy(update={"head": None, "kwargs": ours}),
        channels=channels,
        image_size=image_size,
        classes=None,
        where=where,
    )
    if loaded.source == "random":
        raise UserError(f"{where}.head: a head needs its backbone's weights; set {where}.weights={card.weights}")
    checksum = backbone_sha256(backbone, loaded)
    refuse_unless(
        card.sha256 == checksum,
        "weights with sha256",
        f"{card.sha256[:12]} ({card.weights})",
        f"{checksum[:12]} ({loaded.source})",
        f"Set {where}.weights to the same file. {again}",
    )
    same = card.prefix in (None, loaded.prefix)
    refuse_unless(
        same,
        "weights with the prefix",
        f"`{card.prefix}`",
        f"`{loaded.prefix}`",
        f"Set {where}.prefix={card.prefix}. {again}",
    )
    mean, std = (list(values) for values in statistics(backbone, spec, channels, where))
    refuse_unless([card.mean, card.std] == [mean, std], "mean and std", [card.mean, card.std], [mean, std], again)
    model, kwargs = put_head(backbone, loaded, tensors, spec.model, image_size, where)
    total = len(model.state_dict())
    text = f"head {spec.head} (sha256 {card.head_sha256[:12]}) for {count} classes, fitted on {card.labels} labels"
    matched = total - len(classifier(model))
    return model, replace(loaded, kwargs=kwargs, matched=matched, total=total, head=text)


def put_head(
    backbone: nn.Module,
    loaded: Loaded,
    tensors: State,
    name: str,
    image_size: tuple[int, int],
    where: str,
) -> tuple[nn.Module, dict[str, Any]]:
    """A new model with the backbone's weights and this classifier, and its keyword arguments. Raises `UserError`.

    Both classifiers of a distilled DeiT get the same tensors, because its logits are the mean of both and its pooled
    features the mean of the two tokens.
    """
    model, kwargs = create(name, image_size, False, loaded.kwargs | {"num_classes": len(tensors["bias"])}, where)
    state = backbone.state_dict()
    head = classifier(model)
    for key, old in head.items():
        tensor = tensors[key.rpartition(".")[2]] if key.endswith(("weight", "bias")) else old
        if tensor.numel() != old.numel():
            raise UserError(
                f"{where}: the classifier of {name} has shape {tuple(old.shape)}, the head {tuple(tensor.shape)}"
            )
        state[key] = tensor.reshape(old.shape)  # the weight of a 1x1 convolution has two more dimensions
    if not head:
        raise UserError(
            f"{where}: timm does not name the classifier layer of {name}, so it cannot get a head; fine-tune it instead"
        )
    load_weights(model, state, Path("head.safetensors"), where)
    return model, kwargs
