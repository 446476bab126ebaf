"""The recipes of `scalekd detect` and `scalekd segment`: YAML + `key=value`, with all errors told at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from scalekd.common.sections import ImageSize, Pixels, Positive, Section, Seed, Share, validated
from scalekd.config.any_recipe import AnyRecipe
from scalekd.config.files import Shelf, override, recipe_values
from scalekd.config.misfits import idle_in, unread, without_effect
from scalekd.models.options import Backbone
from scalekd.models.weights.folder import is_drop_rate
from scalekd.train.options import BaseOptim, Schedule, Steps, Train

from .tasks import TASKS

SHELVES = {name: Shelf(f"transfer/recipes/{name}", f"{task.command} recipes") for name, task in TASKS.items()}


class Reading(Section):
    channels: Literal[1, 3] = 3
    on_bad_image: Literal["error", "skip"] = "error"
    """An image or mask that cannot be used: stop and name it, or leave it out and list it in the run's folder."""
    max_bad: Share = 0.01
    """`on_bad_image: skip` stops when more than this share of the images is bad."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 4


class DetectionData(Reading):
    annotations: str
    """COCO's instances file to train on."""
    images: str
    """The folder that its file names are relative to."""
    val_annotations: str
    val_images: str
    scales: tuple[Pixels, ...] = tuple(range(480, 801, 32))
    """Training: an image's short side is one of these."""
    short: Pixels = 800
    """Validation: its short side."""
    long: Pixels = 1333
    """Its long side at most, in both."""
    flip: Share = 0.5


class SegmentationData(Reading):
    root: str
    """A folder in ADE20K's layout, or with images and masks (docs/how-to/transfer.md)."""
    classes: str | None = None
    """A file with the name of a class per line; `classes.txt` of the folder unless given."""
    reduce_zero_label: bool = False
    """Masks hold 0 for pixels without a class and count the classes from 1, as ADE20K's."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Held out where the folder has no validation part."""
    seed: Seed = 0
    """Chooses what is held out."""
    crop: ImageSize = 512
    """Pixels of a training crop; its shorter side is what an image's short side is resized to."""
    scale: tuple[Annotated[float, Field(gt=0, le=16)], Annotated[float, Field(gt=0, le=16)]] = (0.5, 2.0)
    """Training: times that size."""
    flip: Share = 0.5
    photometric: bool = True
    """Training: random brightness, contrast, saturation and hue."""


class DetectorOptions(Section):
    anchors: Annotated[tuple[Pixels, ...], Field(min_length=5, max_length=5)] = (32, 64, 128, 256, 512)
    """Pixels of an anchor's side at the strides 4, 8, 16, 32 and 64."""
    width: Annotated[int, Field(gt=0, le=2**14)] = 256
    """Channels of the feature pyramid and the mask head; the box head has four times as many."""
    regions: Positive = 512
    """Of an image, how many the box head learns from in a step."""
    proposals: tuple[Positive, Positive] = (2000, 1000)
    """Of an image, how many the box head chooses among, in training and in evaluation."""
    freeze_norms: bool = True
    """Batch norms of the backbone keep the statistics they came with; off for a backbone from scratch."""


class SegmenterOptions(Section):
    width: Positive = 512
    """Channels of the decoder."""
    inference: Literal["whole", "sliding"] = "whole"
    """Validation: images at once, or through windows of `data.crop` every two thirds of it."""


class Iterations(Steps):
    iterations: Positive
    eval_every: Positive = 8000
    """Iterations between validations."""


class TransferOptim(BaseOptim):
    lr: Annotated[float, Field(gt=0)] = 1e-4
    stage_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of n stages (of a ViT: blocks) the i-th from the image, counted from 0, learns at lr * stage_decay ** (n - i)."""


class IterationSchedule(Section):
    name: Literal["cosine", "poly"] = "cosine"
    power: Annotated[float, Field(gt=0)] = 1.0
    """Of `poly`: lr * (1 - step / iterations) ** power."""
    warmup_iterations: Annotated[int, Field(ge=0)] = 0
    warmup_lr: Annotated[float, Field(ge=0)] = 0.0
    """What it begins with, in all layers: below the rate of the first one."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0


class Transfer(AnyRecipe):
    name: Annotated[str, Field(pattern=r"^\w[\w .+-]*$")]
    """The run's; its folder is runs/NAME unless --out says otherwise."""
    seed: Seed = 0
    backbone: Backbone
    optim: TransferOptim = TransferOptim()
    track: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ("tensorboard",)


class Detection(Transfer):
    data: DetectionData
    detector: DetectorOptions = DetectorOptions()
    train: Train
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def _fits_together(self) -> Detection:
        data, schedule = self.data, self.schedule
        problems = _common_problems(self)
        if data.short > data.long or max(data.scales) > data.long:
            problems.append(
                f"data.long {data.long} is below data.short or one of data.scales; no image gets that large"
            )
        if schedule.warmup_epochs >= self.train.epochs:
            problems.append(
                f"schedule.warmup_epochs {schedule.warmup_epochs:g} leaves nothing of train.epochs {self.train.epochs}"
            )
        if self.detector.freeze_norms and self.backbone.weights in (None, "random"):
            problems.append(
                "detector.freeze_norms: a backbone without trained weights has no statistics to keep; set "
                "detector.freeze_norms=false, or name backbone.weights"
            )
        problems += without_effect(idle_in(schedule))
        if problems:
            raise ValueError("\n".join(problems))
        return self


class Segmentation(Transfer):
    data: SegmentationData
    segmenter: SegmenterOptions = SegmenterOptions()
    train: Iterations
    schedule: IterationSchedule = IterationSchedule()

    @model_validator(mode="after")
    def _fits_together(self) -> Segmentation:
        data, schedule = self.data, self.schedule
        problems = _common_problems(self)
        if data.scale[0] > data.scale[1]:
            problems.append(f"data.scale: {list(data.scale)} ends below its beginning")
        if data.photometric and data.channels == 1:
            problems.append(
                "data.photometric: it changes saturation and hue, and grey images have none; set data.photometric=false"
            )
        if schedule.warmup_iterations >= self.train.iterations:
            problems.append(
                f"schedule.warmup_iterations {schedule.warmup_iterations} leaves nothing of train.iterations "
                f"{self.train.iterations}"
            )
        problems += without_effect(
            [
                (schedule.name != "poly", "schedule.power", schedule, "schedule.name: poly"),
                (schedule.warmup_iterations == 0, "schedule.warmup_lr", schedule, "schedule.warmup_iterations above 0"),
            ]
        )
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _common_problems(config: Any) -> list[str]:
    train, data = config.train, config.data
    problems = unread(config.optim)
    if train.batch_size % train.accumulate:
        problems.append(f"train.batch_size {train.batch_size} is not a multiple of train.accumulate {train.accumulate}")
    if config.backbone.weights is None:
        problems.append(
            "backbone.weights: none are named; set backbone.weights=pretrained, to a file, or to random if you mean it"
        )
    problems += without_effect([(data.on_bad_image == "error", "data.max_bad", data, "data.on_bad_image: skip")])
    return problems


SCHEMAS: dict[str, type[Detection] | type[Segmentation]] = {"detection": Detection, "segmentation": Segmentation}


def load(task: str, recipe: str, overrides: Iterable[str] = ()) -> Any:
    """A `Detection` or `Segmentation`, by `task`. recipe: a shipped one's name or a YAML file.

    An override that names another `backbone.model` drops what the recipe says of its own, but for rates of dropping.
    Raises `UserError` that lists every problem, each with the nearest valid name.
    """
    values = recipe_values(recipe, shelf=SHELVES[task])
    for text in overrides:
        before = values.get("backbone")
        override(values, text)
        if text.startswith("backbone.model=") and isinstance(before, dict):
            values["backbone"] = _other_model(before)
    return validated(SCHEMAS[task], values, recipe)


def _other_model(before: dict[str, Any]) -> dict[str, Any]:
    kwargs = before.get("kwargs")
    rates = {k: v for k, v in (kwargs if isinstance(kwargs, dict) else {}).items() if is_drop_rate(k)}
    return {key: before[key] for key in ("model", "weights") if key in before} | {"kwargs": rates}
