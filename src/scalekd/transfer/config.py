"""The recipes of `scalekd detect` and `scalekd segment`: all their keys and checks; all errors are reported together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from scalekd.common.sections import ImageSize, Pixels, Positive, Section, Seed, Share, Workers, validated
from scalekd.config.base_recipe import AnyRecipe
from scalekd.config.cross_checks import idle_in, unread, without_effect
from scalekd.config.recipe_files import Shelf, override, recipe_values
from scalekd.models.options import Backbone
from scalekd.models.weights.folder import is_drop_rate
from scalekd.train.options import BaseOptim, Schedule, Steps, Train

from .tasks import TASKS, DetectorKind

SHELVES = {name: Shelf(f"transfer/recipes/{name}", f"{task.command} recipes") for name, task in TASKS.items()}


class Reading(Section):
    channels: Literal[1, 3] = 3
    on_bad_image: Literal["error", "skip"] = "error"
    """For an image or mask that cannot be used: stop with an error, or skip it and list it in the run's folder."""
    max_bad: Share = 0.01
    """`on_bad_image: skip` stops the run if more than this share of the images is bad."""
    workers: Workers = "auto"
    """Processes that load images, per training process; auto: by device and cores."""


class DetectionData(Reading):
    annotations: str
    """Training annotations in COCO's instances format."""
    images: str
    """The folder that the file names in `annotations` are relative to."""
    val_annotations: str
    val_images: str
    scales: tuple[Pixels, ...] = tuple(range(480, 801, 32))
    """Training: the short side of an image is resized to one of these."""
    short: Pixels = 800
    """Validation: the short side of an image."""
    long: Pixels = 1333
    """Training and validation: the long side is at most this."""
    flip: Share = 0.5


class SegmentationData(Reading):
    root: str
    """A folder in ADE20K's layout, or with images and masks (docs/how-to/transfer.md)."""
    classes: str | None = None
    """A file with one class name per line; default: `classes.txt` in the folder."""
    reduce_zero_label: bool = False
    """In the masks, 0 means no class and the classes start at 1, as in ADE20K."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the images held out for validation if the folder has no validation part."""
    seed: Seed = 0
    """Chooses the held-out images."""
    crop: ImageSize = 512
    """Size of a training crop in pixels; the short side of an image is resized to the crop's shorter side."""
    scale: tuple[Annotated[float, Field(gt=0, le=16)], Annotated[float, Field(gt=0, le=16)]] = (0.5, 2.0)
    """Training: range of a random factor of that size."""
    flip: Share = 0.5
    photometric: bool = True
    """Training: random changes of brightness, contrast, saturation and hue."""


class DetectorOptions(Section):
    kind: DetectorKind = "mask-rcnn"
    """`mask-rcnn`: boxes and masks, in two stages. `retinanet`: boxes, in one stage, for ONNX runtimes too (`scalekd detect
    export`)."""
    anchors: Annotated[tuple[Pixels, ...], Field(min_length=5, max_length=5)] = (32, 64, 128, 256, 512)
    """Side of an anchor in pixels at the strides 4, 8, 16, 32 and 64; of a RetinaNet at 8, 16, 32, 64 and 128."""
    width: Annotated[int, Field(gt=0, le=2**14)] = 256
    """Channels of the feature pyramid and of the heads; Mask R-CNN's box head has four times as many."""
    regions: Positive = 512
    """Mask R-CNN: regions per image that the box head is trained on in a step."""
    proposals: tuple[Positive, Positive] = (2000, 1000)
    """Mask R-CNN: proposals per image that reach the box head, in training and in evaluation."""
    freeze_norms: bool = True
    """Batch norms of the backbone keep their statistics; set false for a backbone trained from scratch."""


class SegmenterOptions(Section):
    width: Positive = 512
    """Channels of the decoder."""
    inference: Literal["whole", "sliding"] = "whole"
    """Validation: whole images, or sliding windows of `data.crop` with a stride of two thirds of it."""


class Iterations(Steps):
    iterations: Positive
    eval_every: Positive = 8000
    """Iterations between validations."""


class TransferOptim(BaseOptim):
    lr: Annotated[float, Field(gt=0)] = 1e-4
    stage_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """With n stages (in a ViT: blocks), stage i counted from the input, from 0, uses lr * stage_decay ** (n - i)."""
    backbone_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the learning rates of all stages of the backbone; the rest of the model uses lr."""


class IterationSchedule(Section):
    name: Literal["cosine", "poly"] = "cosine"
    power: Annotated[float, Field(gt=0)] = 1.0
    """`poly` only: lr * (1 - step / iterations) ** power."""
    warmup_iterations: Annotated[int, Field(ge=0)] = 0
    warmup_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate of all layers at the start of the warm-up; at most that of the first layer."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0


Projector = Literal["linear", "mlp", "cap"]


class LoopTeacher(Backbone):
    """A frozen teacher whose last map the backbone's coarsest map learns, through a projector."""

    image_size: ImageSize | None = None
    """Size in pixels to which each training image is resized for the teacher, such as 224 or [256, 448] for height and
    width. Default: timm's for that model."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the loss, 1 - cosine."""
    projector: Projector = "mlp"
    """From the channels of the backbone's map to the teacher's: one layer, two layers, or ScaleKD's cross attention."""
    lr_scale: Annotated[float, Field(gt=0)] = 1.0
    """The projector's learning rate, as a multiple of `optim.lr`."""

    def of_model(self) -> dict[str, Any]:
        """The keys that describe the model and its weights."""
        return self.model_dump(include=set(Backbone.model_fields))


class TransferRecipe(AnyRecipe):
    """What the recipes of both tasks have in common."""

    name: Annotated[str, Field(pattern=r"^\w[\w .+-]*$")]
    """Name of the run; its default folder is runs/NAME."""
    seed: Seed = 0
    backbone: Backbone
    teacher: LoopTeacher | None = None
    """A frozen model beside the backbone, in training only. By default there is none."""
    optim: TransferOptim = TransferOptim()
    track: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ("tensorboard",)

    @model_validator(mode="after")
    def _fits_together(self) -> TransferRecipe:
        problems = [*_common_problems(self), *self.problems()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @abstractmethod
    def problems(self) -> list[str]:
        """Conflicts between keys of this task's recipe, and keys without effect."""


class Detection(TransferRecipe):
    data: DetectionData
    detector: DetectorOptions = DetectorOptions()
    train: Train
    schedule: Schedule = Schedule()

    def problems(self) -> list[str]:
        data, schedule = self.data, self.schedule
        problems = []
        if data.short > data.long or max(data.scales) > data.long:
            problems.append(
                f"data.long {data.long} is below data.short or one of data.scales, which no image could reach; raise it"
            )
        if schedule.warmup_epochs >= self.train.epochs:
            problems.append(
                f"schedule.warmup_epochs {schedule.warmup_epochs:g} must be below train.epochs {self.train.epochs}"
            )
        if self.detector.freeze_norms and self.backbone.weights in (None, "random"):
            problems.append(
                "detector.freeze_norms: a backbone without trained weights has no statistics to keep; set "
                "detector.freeze_norms=false or backbone.weights"
            )
        detector, one_stage = self.detector, self.detector.kind != "mask-rcnn"
        idle = [
            (one_stage, f"detector.{key}", detector, "detector.kind: mask-rcnn") for key in ("regions", "proposals")
        ]
        return problems + without_effect([*idle_in(schedule), *idle])


class Segmentation(TransferRecipe):
    data: SegmentationData
    segmenter: SegmenterOptions = SegmenterOptions()
    train: Iterations
    schedule: IterationSchedule = IterationSchedule()

    def problems(self) -> list[str]:
        data, schedule = self.data, self.schedule
        problems = []
        if data.scale[0] > data.scale[1]:
            problems.append(f"data.scale: {list(data.scale)} must be [smallest, largest]")
        if data.photometric and data.channels == 1:
            problems.append(
                "data.photometric changes saturation and hue, which grey images lack; set data.photometric=false"
            )
        if schedule.warmup_iterations >= self.train.iterations:
            problems.append(
                f"schedule.warmup_iterations {schedule.warmup_iterations} must be below train.iterations "
                f"{self.train.iterations}"
            )
        return problems + without_effect(
            [
                (schedule.name != "poly", "schedule.power", schedule, "schedule.name: poly"),
                (schedule.warmup_iterations == 0, "schedule.warmup_lr", schedule, "schedule.warmup_iterations above 0"),
            ]
        )


def _common_problems(config: Any) -> list[str]:
    train, data = config.train, config.data
    problems = unread(config.optim)
    if train.batch_size % train.accumulate:
        problems.append(f"train.batch_size {train.batch_size} is not a multiple of train.accumulate {train.accumulate}")
    if config.backbone.weights is None:
        problems.append(
            "backbone.weights is not set; set it to pretrained, to a file, or to random for an untrained backbone"
        )
    if config.teacher is not None and config.teacher.weights is None:
        problems.append("teacher.weights is not set; set it to pretrained or to a file")
    problems += without_effect([(data.on_bad_image == "error", "data.max_bad", data, "data.on_bad_image: skip")])
    return problems


SCHEMAS: dict[str, type[Detection] | type[Segmentation]] = {"detection": Detection, "segmentation": Segmentation}


def load(task: str, recipe: str, overrides: Iterable[str] = ()) -> Any:
    """Loads a recipe as `Detection` or `Segmentation`, by `task`.

    recipe: the name of a shipped recipe, or a YAML file. overrides: `key=value`.
    An override of `backbone.model` discards the recipe's other keys of `backbone`, except `weights` and dropout rates.
    One of `teacher.model` discards those that describe another model: `kwargs`, `prefix`, `image_size`, `mean`, `std`.
    Raises `UserError` that lists every problem, each with the nearest valid name.
    """
    values = recipe_values(recipe, shelf=SHELVES[task])
    for text in overrides:
        before, teacher = values.get("backbone"), values.get("teacher")
        override(values, text)
        if text.startswith("backbone.model=") and isinstance(before, dict):
            values["backbone"] = _other_model(before)
        if text.startswith("teacher.model=") and isinstance(teacher, dict):
            values["teacher"] = {key: teacher[key] for key in TEACHING if key in teacher}
    return validated(SCHEMAS[task], values, recipe)


TEACHING = ("model", "weights", "weight", "projector", "lr_scale")  # keys that are kept for another teacher


def _other_model(before: dict[str, Any]) -> dict[str, Any]:
    """What remains of a recipe's `backbone` when another model replaces it."""
    kwargs = before.get("kwargs")
    rates = {k: v for k, v in (kwargs if isinstance(kwargs, dict) else {}).items() if is_drop_rate(k)}
    return {key: before[key] for key in ("model", "weights") if key in before} | {"kwargs": rates}
