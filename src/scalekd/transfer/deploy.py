"""A trained detector or segmenter as two files, weights and a card, and back; with the proof that nothing was lost.

The weights are safetensors, which hold no code, and the card is JSON that names a timm model and shapes, so files from
elsewhere can be opened. As `scalekd.export` does for students.
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

from scalekd.common.errors import UserError, first_line, nearest
from scalekd.common.files import is_file, replacing, write_text
from scalekd.common.sections import Pixels
from scalekd.common.text import printable, shortened
from scalekd.models.options import Backbone
from scalekd.models.weights.match import sha256_of

from .detection.model import Detector
from .pyramid import STRIDES, Pyramid
from .segmentation.model import UPerNet
from .tasks import TASKS, TaskName, need_extra

NOISE = 256  # pixels, at most, of the images that outputs are compared on


class Card(BaseModel):
    """What a card must have to be used without surprises; it has more, such as `figures` and `provenance`."""

    model_config = ConfigDict(allow_inf_nan=False, use_attribute_docstrings=True)
    task: TaskName
    backbone: str
    """A timm name."""
    kwargs: dict[str, Any]
    """All arguments of `timm.create_model`, those for images of any size included."""
    image_size: tuple[Pixels, Pixels]
    """Height and width that the backbone was built for."""
    classes: Annotated[list[str], Field(min_length=1)]
    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]
    """For pixels in [0, 1], one value per channel."""
    short: Pixels
    long: Pixels
    """An image is resized so that its short side has `short` pixels, or its long one `long` where that is less."""
    sha256: str
    """Of the weights file."""

    @model_validator(mode="after")
    def _usable(self) -> Card:
        Backbone(model=self.backbone, kwargs=self.kwargs)
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise ValueError("mean and std are of one channel or of three")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have one name")
        if self.short > self.long:
            raise ValueError(f"short is {self.short} pixels, and long only {self.long}")
        return self


class DetectorCard(Card):
    anchors: Annotated[list[Pixels], Field(min_length=5, max_length=5)]
    """Pixels, the side of an anchor at each stride."""
    width: Annotated[int, Field(gt=0, le=2**14)] = 256
    """Channels of the feature pyramid."""
    proposals: Annotated[int, Field(gt=0)] = 1000
    """Of an image, how many the box head chooses among."""
    category_ids: list[int] | None = None
    """Of the classes in the training annotations, for predictions in COCO's format; 1, 2, ... unless given."""

    @model_validator(mode="after")
    def _one_id_per_class(self) -> DetectorCard:
        if self.category_ids is not None and len(self.category_ids) != len(self.classes):
            raise ValueError(f"{len(self.category_ids)} category ids for {len(self.classes)} classes")
        return self


class SegmenterCard(Card):
    width: Annotated[int, Field(gt=0, le=2**14)]
    """Channels of the decoder."""
    crop: tuple[Pixels, Pixels]
    """Height and width of a training crop, and of a window."""
    inference: Literal["whole", "sliding"]
    reduce_zero_label: bool
    """In masks, 0 is "other" and classes count from 1."""

    @model_validator(mode="after")
    def _sizes_of_validation(self) -> SegmenterCard:
        if self.long != 4 * self.short:
            raise ValueError(f"long is {self.long} pixels, not four times short, as images are validated at")
        return self


CARDS: dict[str, type[Card]] = {"detection": DetectorCard, "segmentation": SegmenterCard}


# ---------------------------------------------------------------- out


def export(model: nn.Module, path: Path, card: dict[str, Any]) -> float:
    """Writes `path` (.safetensors) and, beside it, the card as JSON; loads both back.

    model: what is deployed: torchvision's `MaskRCNN` of a `Detector`, or a `UPerNet`. It is left in the mode it was in.
    card: as `DetectorCard` or `SegmenterCard` has it, less sha256.
    Returns the largest difference between the outputs of the model and of the files loaded back (`outputs`).
    Raises `UserError` when it cannot be written, or for a card that does not describe the model.
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
    """Two normalised images of whole strides that a backbone of one size takes too."""
    height, width = (max(STRIDES[-1], min(side, NOISE) // STRIDES[-1] * STRIDES[-1]) for side in card["image_size"])
    return torch.randn(2, len(card["mean"]), height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(model: Any, images: Tensor) -> list[Tensor]:
    """What two models are compared by, in evaluation mode. images: (B, C, H, W), normalised.

    A UPerNet's logits. Of a Mask R-CNN the maps of its FPN, what its RPN says of every anchor, and classes, boxes and
    masks of fixed regions; not what it finds in the end, whose number and order hang on last digits.
    """
    with _evaluating(model):
        if isinstance(model, UPerNet):
            return [model(images)]
        maps = model.backbone(images)
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
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then module by module as it was: frozen batch norms stay so."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# ---------------------------------------------------------------- and in


def load(path: Path, task: TaskName) -> tuple[Any, dict[str, Any]]:
    """(model in evaluation mode on the CPU, its card) of a run's folder or of an exported .safetensors file.

    A `Detector`, which takes uint8 images of any size and answers in their pixels; or a `UPerNet`, which takes
    normalised ones. Raises `UserError` for what is no export of this task or was changed, and without the extra.
    """
    need_extra(task)
    file = path / TASKS[task].weights if path.is_dir() else path
    card_file = file.with_suffix(".json")
    # nothing but safetensors: other weights files may hold code
    if file.suffix != ".safetensors" or not is_file(file) or not is_file(card_file):
        raise UserError(_nothing_there(path, task))
    card = read_card(card_file, task)
    if card["sha256"] != sha256_of(file):
        raise UserError(
            f"{file} does not fit its card {card_file}: it has another sha256, so it was changed or is of another "
            "export; take both files from one run"
        )
    model = _built(card, card_file)
    deployed = model.student if isinstance(model, Detector) else model
    _fill(deployed, file, card_file)
    return model.eval(), card


def read_card(file: Path, task: TaskName) -> dict[str, Any]:
    """Raises `UserError` for a file that is no card of this task, or names anything but a model of timm's and shapes."""
    what = f"{file} is not a {TASKS[task].trained}'s card"
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
        theirs = card.get("task") if isinstance(card, dict) else None
        if theirs in list(TASKS) and theirs != task:
            raise UserError(f"{what}: it is for `{TASKS[theirs].command}`")
        CARDS[task].model_validate(card)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{what}: {shortened(f'{place}: ' * bool(place) + first['msg'])}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{what}: {first_line(error)}") from None
    return card


def _nothing_there(path: Path, task: TaskName) -> str:
    ours = TASKS[task]
    if path.is_dir():
        other = next((t for t in TASKS.values() if t is not ours and (path / t.weights).is_file()), None)
        if other is not None:
            return f"{path} holds a run of `{other.command}`; give it to that command"
        if (path / "student.safetensors").is_file():
            return (
                f"{path} holds a distilled student, a backbone: `{ours.command} train RECIPE --backbone {path}` "
                f"makes a {ours.trained} of it"
            )
    elif not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        return f"no file or folder {path}.{printable(nearest(path.name, beside)) if beside else ''}"
    return f"{path}: no {ours.weights} with its .json there; `{ours.command} train` writes them when it is done"


def _built(card: dict[str, Any], card_file: Path) -> Any:
    """The module that a card describes, at initial values. Raises `UserError`."""
    try:
        pyramid = Pyramid(timm.create_model(card["backbone"], **card["kwargs"]), tuple(card["image_size"]))
        if card["task"] == "segmentation":
            return UPerNet(pyramid, len(card["classes"]), card["width"])
        told = DetectorCard.model_validate(card)
        return Detector(
            pyramid,
            len(told.classes),
            tuple(told.mean),
            tuple(told.std),
            short=told.short,
            long=told.long,
            anchors=told.anchors,
            width=told.width,
            proposals=(told.proposals, told.proposals),
        )
    except Exception as error:  # whatever timm ends with, given such arguments
        raise UserError(f"{card['backbone']} cannot be built as {card_file} says: {first_line(error)}") from None


def _fill(model: nn.Module, file: Path, card_file: Path) -> None:
    """Raises `UserError` for a file whose tensors are not exactly the model's."""
    try:
        state = load_file(file)
    except Exception as error:  # safetensors' own kinds
        raise UserError(f"{file} cannot be read as safetensors: {first_line(error)}") from None
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in state.items()}
    odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if odd:
        first = odd[0]
        raise UserError(
            f"{file} does not fit its card {card_file}: {len(odd)} of {len(ours)} tensors differ, such as "
            f"{printable(first)}, {theirs.get(first, 'missing')} in the file and {ours.get(first, 'none')} in the model"
        )
    model.load_state_dict(state)
