"""From a recipe to everything that its run needs: data, models, methods, optimiser, schedule."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.data import Mixup
from torch import Tensor, nn

from . import parallel
from .class_order import put_in_order
from .clock import Stopwatch
from .compiled import compile_step
from .config import Config, Model, height_and_width
from .data import (
    Batch,
    Images,
    eval_batches,
    load_batch,
    make_mixup,
    mixed,
    open_split,
    seed_everything,
    train_batches,
    training_images,
    validation_images,
)
from .distiller import Distiller, Teacher
from .embeddings import is_embedding
from .errors import UserError, printable
from .evaluate import NEIGHBOURS, evaluate, evaluate_features
from .head_card import read_head
from .loaded import Loaded
from .loss_options import reads_logits, reads_teacher
from .models import build_model, resolve, statistics
from .optim import make_optimizer, make_schedule
from .samplers import Key, Mix, TrainSampler
from .teacher_outputs import TeacherOutputs
from .training import Training, expect_batches, scaler_and_average


class Taught(NamedTuple):
    """A teacher of a run."""

    place: str  # in the recipe: `teacher`, or `teachers.NAME`
    spec: Model
    teacher: Teacher
    loaded: Loaded

    @property
    def label(self) -> str:
        return self.place.removeprefix("teachers.")


@dataclass(kw_only=True)
class Run(Training):
    """A distillation, or a training without a teacher, built."""

    batch = Batch
    config: Config
    train_images: Images
    val_images: Images
    model: Distiller
    mixup: Mixup | None
    teacher_outputs: TeacherOutputs | None = None

    @property
    def distiller(self) -> Distiller:
        return self.model

    @property
    def student(self) -> nn.Module:
        return self.model.student

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"student": self.model.student, "methods": self.model.methods}

    @property
    def figures(self) -> dict[str, str]:
        neighbours = "" if self.has_classifier else f"{min(NEIGHBOURS, len(self.val_images) - 1)}-nn "
        return {"top1": f"{neighbours}top-1", "top5": "top-5"}

    @property
    def eval_batch_size(self) -> int:
        return min(256, 4 * super().eval_batch_size)  # without gradients, four times as many fit

    @property
    def teacher_clock(self) -> Stopwatch:
        return self.model.teacher_clock

    @property
    def taught_by(self) -> list[Taught]:
        """Its teachers."""
        places = {name: self.config.place_of(name) for name in self.config.all_teachers}
        return [
            Taught(places[name], spec, self.distiller.teachers[name], self.loaded[places[name]])
            for name, spec in self.config.all_teachers.items()
        ]

    @property
    def has_classifier(self) -> bool:
        """Whether the student has one: not where no loss would train it."""
        return self.distiller.student_view.shapes.classes > 0

    def losses(self, model: nn.Module, batch: Batch, micro: int) -> dict[str, Tensor]:
        images, targets = self.inputs(batch)
        known = self.teacher_outputs and self.teacher_outputs.features(micro, images)
        return model(images, targets, known) if known else model(images, targets)

    def notes(self) -> dict[str, dict[str, Any]]:
        if shared := self.teacher_outputs:
            told = {"computed": shared.computed, "read": shared.read, "file": str(shared.path)}
            return {"teacher_outputs": told}
        return {}

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the distiller is called with: images (B, C, H, W) in [0, 1] and targets, mixed where the recipe says so."""
        images = batch.images.to(self.device, non_blocking=True).float() / 255
        targets = batch.targets.to(self.device, non_blocking=True)
        if self.config.train.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return mixed(images, targets, self.mixup) if self.mixup else (images, targets)

    def train_batches(self, sampler: TrainSampler, workers: int) -> Generator[Batch, None, None]:
        return train_batches(self.train_images, sampler, workers, self.device.type == "cuda")

    def eval_batches(self, size: int, workers: int) -> Generator[Batch, None, None]:
        pin = self.device.type == "cuda"
        return eval_batches(self.val_images, size, workers, pin, parallel.rank(), parallel.world())

    def again(self, keys: list[Key]) -> tuple[Batch, list[str]]:
        images = self.train_images
        return load_batch(images, keys), [images.source.where(images.indices[i]) for _, i in keys]

    def validate(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """The deployed student's accuracy: `evaluate`, or `evaluate_features` without a classifier."""
        by = evaluate if self.has_classifier else evaluate_features
        return by(self.deployed, batches, self.model.student_mean, self.model.student_std, self.device)


def build(config: Config, device: torch.device) -> Run:
    """Opens the data and builds models, methods, optimiser and schedule. Raises `UserError`."""
    seed_everything(config.seed, "models")
    data, train = config.data, config.train
    size = height_and_width(data.image_size)
    sizes = {name: height_and_width(spec.image_size or size) for name, spec in config.all_teachers.items()}
    split = open_split(data)
    classes = len(split.classes)
    head = classes if any(map(reads_logits, config.losses)) else 0
    student, student_loaded = build_model(
        config.student, channels=data.channels, image_size=size, classes=head, where="student"
    )
    if not head:
        _check_backbone(student, config.student.model)
    student_stats = statistics(student, config.student, data.channels, "student")
    loaded = {"student": student_loaded}
    teachers, stats = {}, {}
    for name, spec in config.all_teachers.items():
        where = config.place_of(name)
        if spec.head:
            _check_head(spec.head, split.classes, where)
        own = None if spec.weights == "pretrained" else classes
        teachers[name], loaded[where] = build_model(
            spec, channels=data.channels, image_size=sizes[name], classes=own, where=where
        )
        if spec.classes is not None:
            put_in_order(teachers[name], spec.classes, split.classes, where)
        _check_outputs(config, name, teachers[name], classes)
        stats[name] = statistics(teachers[name], spec, data.channels, where)
    # pixels for the largest of all, so that none sees a blown-up image
    pixels = data.model_copy(update={"image_size": tuple(map(max, zip(size, *sizes.values())))})
    images = training_images(split, pixels, config.augment, *student_stats, config.seed)
    mix = mix_of(config, len(images), split.labelled)
    _check_batch(config, len(images), mix)
    if train.sync_batchnorm and device.type == "cpu":
        raise UserError("train.sync_batchnorm needs GPUs; torch has it for CUDA only")
    if train.sync_batchnorm:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    distiller = Distiller(
        student,
        teachers,
        config.losses,
        image_size=size,
        teacher_size=sizes,
        student_stats=student_stats,
        teacher_stats=stats,
        student_cuts=config.student.cuts,
        teacher_cuts={name: spec.cuts for name, spec in config.all_teachers.items()},
    )
    if train.sync_batchnorm:
        distiller.methods = nn.SyncBatchNorm.convert_sync_batchnorm(distiller.methods)
    distiller.to(device)
    if train.channels_last:
        distiller.to(memory_format=torch.channels_last)
    if train.compile:
        compile_step(distiller, train.batch_size // (train.accumulate * parallel.world()))
    optimizer = make_optimizer(config, distiller)
    steps_per_epoch = len(images) // train.batch_size
    if mix is not None:  # until both were gone through
        rest = len(images) - mix.labelled
        steps_per_epoch = max(1, mix.labelled // mix.per_batch, rest // (train.batch_size - mix.per_batch))
    return Run(
        config=config,
        device=device,
        classes=split.classes,
        train_images=images,
        val_images=validation_images(split, data, config.augment),
        model=distiller,
        loaded=loaded,
        optimizer=optimizer,
        schedule=make_schedule(config, optimizer, steps_per_epoch),
        mixup=make_mixup(config.augment, classes),
        steps_per_epoch=steps_per_epoch,
        mix=mix,
        repeats=config.augment.repeats,
        **scaler_and_average(train, student, device),
    )


def logit_losses(config: Config, teacher: str) -> list[str]:
    """The losses of a recipe that compare this teacher's logits with the student's."""
    return [
        loss
        for loss, options in config.losses.items()
        if reads_teacher(loss) and reads_logits(loss) and teacher in options.get("teachers", config.all_teachers)
    ]


def gives_embeddings(spec: Model, outputs: int, classes: int) -> bool:
    """Whether a teacher's outputs are an embedding. In a file, as many as the data has classes are taken for classes."""
    same = outputs == classes and spec.weights != "pretrained"
    return spec.head is None and not same and is_embedding(spec.model, outputs)


def _check_outputs(config: Config, teacher: str, model: nn.Module, classes: int) -> None:
    spec, where, outputs = config.all_teachers[teacher], config.place_of(teacher), getattr(model, "num_classes", 0)
    losses = logit_losses(config, teacher)
    if losses and gives_embeddings(spec, outputs, classes):
        raise UserError(
            f"losses.{losses[0]}: the {outputs} outputs of {where}, {spec.model}, are an embedding, not classes. Fit a "
            f"classifier for yours with `scalekd head` and set {where}.head, or use feature methods: scalekd, fd"
        )


def _check_backbone(student: nn.Module, name: str) -> None:
    hidden, features = getattr(student, "head_hidden_size", None), getattr(student, "num_features", None)
    if hidden != features:
        raise UserError(
            f"student.model: no loss reads the student's logits, and {name} has a layer between its last map and its "
            f"classifier ({features} to {hidden} channels) that nothing would train. Add a loss on logits, such as kd "
            "with a teacher that has a classifier for your classes, or choose a student without such a layer, as ResNets are"
        )


def mix_of(config: Config, images: int, labelled: int) -> Mix | None:
    """How labelled and unlabelled images share a batch, if there are both. Raises `UserError`."""
    train, parts = config.train, config.train.accumulate * parallel.world()
    if labelled in (0, images):
        return None
    share, part = config.data.unlabelled_share, train.batch_size // parts
    unlabelled = round(part * share)
    if unlabelled in (0, part):
        raise UserError(
            f"data.unlabelled_share {share:g} of {part} images per process and step is {unlabelled}: a step needs both "
            "images with labels and without; change it, or raise train.batch_size"
        )
    return Mix(labelled, (part - unlabelled) * parts)


def _check_head(folder: str, classes: list[str], where: str) -> None:
    theirs = read_head(resolve(folder), f"{where}.head")[0].classes
    if theirs != classes:
        odd = next((f"{a} there, {b} here" for a, b in zip(theirs, classes) if a != b), f"{len(theirs)} there")
        raise UserError(
            f"{where}.head: {folder} was fitted for other classes than the data's {len(classes)}: {printable(odd)}. "
            "Fit a head for these classes: scalekd head"
        )


def _check_batch(config: Config, images: int, mix: Mix | None) -> None:
    train, parts = config.train, config.train.accumulate * parallel.world()
    expect_batches(train, images if mix is None else None)
    if train.batch_size == parts:
        raise UserError("one image per process and step: batch normalisation needs two or more; raise train.batch_size")
    labelled = mix.per_batch if mix else 0
    for count, kind in ((labelled // parts, "labelled "), ((train.batch_size - labelled) // parts, "")):
        if (config.augment.mixup or config.augment.cutmix) and count % 2:
            raise UserError(
                f"mixup pairs images: {count} {kind}per process and step is odd; change train.batch_size"
                + " or data.unlabelled_share" * bool(mix)
            )
