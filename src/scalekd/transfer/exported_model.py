"""Exports a trained detector or segmenter as weights and a card, loads it back, and compares the outputs.

The weights are safetensors, which contain no code, and the card is JSON with the name of a timm model and shapes, so
files from other people are safe to open. `scalekd.models.student_file` does the same for students.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet

from scalekd.common.errors import UserError, first_line, nearest
from scalekd.common.files import is_file, reject_links, replacing, write_text
from scalekd.common.sections import Pixels
from scalekd.common.text import in_shell, printable, shortened
from scalekd.models.options import Backbone
from scalekd.models.weights.match import sha256_of

from .detection.model import FINEST, Detector
from .pyramid import STRIDES, Pyramid
from .segmentation.model import UPerNet
from .tasks import TASKS, DetectorKind, TaskName, need_extra

NOISE = 256  # pixels: largest side of the images used to compare outputs


class Card(BaseModel):
    """The keys that a card must have. A card contains more, such as `figures` and `provenance`."""

    model_config = ConfigDict(allow_inf_nan=False, use_attribute_docstrings=True)
    task: TaskName
    backbone: str
    """A timm name."""
    kwargs: dict[str, Any]
    """All arguments of `timm.create_model`, including those for images of any size."""
    image_size: tuple[Pixels, Pixels]
    """Height and width in pixels that the backbone was built for."""
    classes: Annotated[list[str], Field(min_length=1)]
    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]
    """For pixels in [0, 1], one value per channel."""
    short: Pixels
    long: Pixels
    """An image is resized so that its short side has `short` pixels, or its long side `long` if that is smaller."""
    sha256: str
    """Checksum of the weights file."""

    @model_validator(mode="after")
    def _usable(self) -> Card:
        Backbone(model=self.backbone, kwargs=self.kwargs)
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise ValueError("mean and std must both have one value or three")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have the same name")
        if self.short > self.long:
            raise ValueError(f"short ({self.short} pixels) is larger than long ({self.long})")
        return self


class DetectorCard(Card):
    kind: DetectorKind = "mask-rcnn"
    anchors: Annotated[list[Pixels], Field(min_length=5, max_length=5)]
    """Side of an anchor in pixels at each stride."""
    width: Annotated[int, Field(gt=0, le=2**14)] = 256
    """Channels of the feature pyramid."""
    proposals: Annotated[int, Field(gt=0)] = 1000
    """Proposals per image that reach the box head of a Mask R-CNN."""
    category_ids: list[int] | None = None
    """Ids of the classes in the training annotations, for predictions in COCO's format; 1, 2, ... by default."""

    @model_validator(mode="after")
    def _one_id_per_class(self) -> DetectorCard:
        if self.category_ids is not None and len(self.category_ids) != len(self.classes):
            raise ValueError(f"{len(self.category_ids)} category ids for {len(self.classes)} classes")
        return self


class SegmenterCard(Card):
    width: Annotated[int, Field(gt=0, le=2**14)]
    """Channels of the decoder."""
    crop: tuple[Pixels, Pixels]
    """Height and width in pixels of a training crop and of a sliding window."""
    inference: Literal["whole", "sliding"]
    reduce_zero_label: bool
    """In masks, 0 means "other" and classes start at 1."""

    @model_validator(mode="after")
    def _sizes_of_validation(self) -> SegmenterCard:
        if self.long != 4 * self.short:
            raise ValueError(f"long is {self.long} pixels; validation needs four times short, {4 * self.short}")
        return self


CARDS: dict[str, type[Card]] = {"detection": DetectorCard, "segmentation": SegmenterCard}


# ---------------------------------------------------------------- export


def export(model: nn.Module, path: Path, card: dict[str, Any]) -> float:
    """Writes `path` (.safetensors) and the card next to it as JSON, and loads both back.

    model: the deployed part: torchvision's model in a `Detector`, or a `UPerNet`. Its training mode is restored.
    card: the keys of `DetectorCard` or `SegmenterCard` without sha256.
    Returns the largest absolute difference between the `outputs` of the model and of the loaded files.
    Raises `UserError` if a file cannot be written or the card does not describe the model.
    """
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    with replacing(path) as file:
        file.write(save(state, metadata={"scalekd": json.dumps(card)}))
    write_text(path.with_suffix(".json"), json.dumps(card | {"sha256": sha256_of(path)}, indent=2) + "\n")
    device = next(model.parameters()).device
    loaded = load(path, card["task"])[0].to(device)
    again = loaded.student if isinstance(loaded, Detector) else loaded
    images = _noise(card).to(device)
    pairs = zip(outputs(model, images), outputs(again, images), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def _noise(card: dict[str, Any]) -> Tensor:
    """Two normalised images, (2, C, H, W), with sides that are multiples of 32 and that a fixed-size backbone accepts."""
    height, width = (max(STRIDES[-1], min(side, NOISE) // STRIDES[-1] * STRIDES[-1]) for side in card["image_size"])
    return torch.randn(2, len(card["mean"]), height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(model: Any, images: Tensor) -> list[Tensor]:
    """Outputs in evaluation mode that are compared between two models. images: (B, C, H, W), normalised.

    For a UPerNet its logits. For a RetinaNet the scores and shifts of every anchor. For a Mask R-CNN the maps of its FPN,
    the RPN's scores and shifts of every anchor, and classes, boxes and masks of fixed regions. Final detections are not
    compared: their number and order depend on rounding.
    """
    with _evaluation_mode(model):
        if isinstance(model, UPerNet):
            return [model(images)]
        maps = model.backbone(images)
        if isinstance(model, RetinaNet):
            return list(model.head(list(maps.values())).values())
        scores, shifts = model.rpn.head(list(maps.values()))
        height, width = images.shape[-2:]
        shares = torch.tensor([[0, 0, 1, 1], [0, 0, 0.5, 0.5], [0.1, 0.2, 0.3, 0.9], [0.6, 0.6, 0.7, 0.7]])
        boxes = [(shares * torch.tensor([width, height, width, height])).to(images)] * len(images)
        sizes = [(height, width)] * len(images)
        heads = model.roi_heads
        classes, offsets = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, boxes, sizes)))
        masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, boxes, sizes)))
        return [*maps.values(), *scores, *shifts, classes, offsets, masks]


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Restores the mode of each module afterwards, so frozen batch norms stay frozen."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# ---------------------------------------------------------------- load


def load(path: Path, task: TaskName) -> tuple[Any, dict[str, Any]]:
    """Loads a run's folder or an exported .safetensors file: (model in evaluation mode on the CPU, its card).

    The model is a `Detector`, which takes uint8 images of any size and returns boxes in their pixels, or a `UPerNet`,
    which takes normalised images. Raises `UserError` if the files are not an export of this task or were changed, or
    if the task's extra is missing.
    """
    need_extra(task)
    if path.is_dir():
        reject_links(path)
    file = path / TASKS[task].weights if path.is_dir() else path
    card_file = file.with_suffix(".json")
    # safetensors only: other weights files may contain code
    if file.suffix != ".safetensors" or not is_file(file) or not is_file(card_file):
        raise UserError(_no_export(path, task))
    card = read_card(card_file, task)
    if card["sha256"] != sha256_of(file):
        raise UserError(
            f"{file} does not match its card {card_file}: the sha256 differs, so the file was changed or belongs to "
            "another export; use both files of one run"
        )
    model = _build(card, card_file)
    deployed = model.student if isinstance(model, Detector) else model
    _load_weights(deployed, file, card_file)
    if not all(p.isfinite().all() for p in deployed.parameters()):
        raise UserError(f"{file} has weights that are not finite: its run diverged; train it again")
    return model.eval(), card


def read_card(file: Path, task: TaskName) -> dict[str, Any]:
    """Reads and checks a card. Raises `UserError` if the file is not a card of this task."""
    problem = f"{file} is not a {TASKS[task].trained}'s card"
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
        other = card.get("task") if isinstance(card, dict) else None
        if other in list(TASKS) and other != task:
            raise UserError(f"{problem}: it is for `{TASKS[other].command}`")
        CARDS[task].model_validate(card)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{problem}: {shortened(f'{key}: ' * bool(key) + first['msg'])}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{problem}: {first_line(error)}") from None
    return card


def _no_export(path: Path, task: TaskName) -> str:
    """The error for a path without an export of this task."""
    wanted = TASKS[task]
    if path.is_dir():
        other = next((t for t in TASKS.values() if t is not wanted and (path / t.weights).is_file()), None)
        if other is not None:
            return f"{path} contains a run of `{other.command}`; use it with that command"
        if (path / "student.safetensors").is_file():
            return (
                f"{path} contains a distilled student; `{wanted.command} train RECIPE {in_shell(f'backbone.model={path}')}` trains a "
                f"{wanted.trained} on it"
            )
    elif not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        return f"no file or folder {path}.{printable(nearest(path.name, siblings)) if siblings else ''}"
    return f"{path}: no {wanted.weights} with its .json; `{wanted.command} train` writes them at the end of a run"


def _build(card: dict[str, Any], card_file: Path) -> Any:
    """The model that a card describes, with initial weights. Raises `UserError`."""
    try:
        model, size = timm.create_model(card["backbone"], **card["kwargs"]), tuple(card["image_size"])
        if card["task"] == "segmentation":
            return UPerNet(Pyramid(model, size), len(card["classes"]), card["width"])
        described = DetectorCard.model_validate(card)
        return Detector(
            Pyramid(model, size, FINEST[described.kind]),
            len(described.classes),
            tuple(described.mean),
            tuple(described.std),
            kind=described.kind,
            short=described.short,
            long=described.long,
            anchors=described.anchors,
            width=described.width,
            proposals=(described.proposals, described.proposals),
        )
    except Exception as error:  # timm raises any type for arguments that do not fit
        raise UserError(f"{card['backbone']} cannot be built from {card_file}: {first_line(error)}") from None


def _load_weights(model: nn.Module, file: Path, card_file: Path) -> None:
    """Raises `UserError` if the names and shapes in the file are not exactly the model's."""
    try:
        state = load_file(file)
    except Exception as error:  # safetensors has its own exception types
        raise UserError(f"{file} cannot be read as safetensors: {first_line(error)}") from None
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in state.items()}
    odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if odd:
        first = odd[0]
        raise UserError(
            f"{file} does not match its card {card_file}: {len(odd)} of {len(ours)} tensors differ, such as "
            f"{printable(first)}, {theirs.get(first, 'missing')} in the file and {ours.get(first, 'none')} in the model"
        )
    model.load_state_dict(state)
