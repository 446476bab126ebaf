"""From a recipe to everything that its run needs: data, models, methods, optimiser, schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from . import parallel
from .config import Config, height_and_width
from .data import Images, make_mixup, open_split, seed_everything, training_images, validation_images
from .distiller import Distiller
from .errors import UserError, printable
from .models import Loaded, build_model, read_head, resolve, statistics
from .optim import make_optimizer, make_schedule
from .teacher_outputs import TeacherOutputs


@dataclass
class Run:
    """Everything that a recipe names, built."""

    config: Config
    device: torch.device
    classes: list[str]
    train_images: Images
    val_images: Images
    distiller: Distiller
    loaded: dict[str, Loaded]  # of "student" and "teacher"
    optimizer: Optimizer
    schedule: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    mixup: Mixup | None
    steps_per_epoch: int
    teacher_outputs: TeacherOutputs | None = None

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.config.train.epochs

    @property
    def deployed(self) -> nn.Module:
        """The student that is evaluated and exported: the averaged one where there is one."""
        return self.ema.module if self.ema is not None else self.distiller.student


def build(config: Config, device: torch.device) -> Run:
    """Opens the data and builds models, methods, optimiser and schedule. Raises `UserError`."""
    seed_everything(config.seed, "models")
    data, train = config.data, config.train
    size = height_and_width(data.image_size)
    teacher_size = height_and_width(config.teacher.image_size or size) if config.teacher else size
    split = open_split(data)
    classes = len(split.classes)
    student, student_loaded = build_model(
        config.student, channels=data.channels, image_size=size, classes=classes, where="student"
    )
    student_stats = statistics(student, config.student, data.channels, "student")
    loaded = {"student": student_loaded}
    teacher = teacher_stats = None
    if config.teacher:
        if config.teacher.head:
            _check_head(config.teacher.head, split.classes)
        head = None if config.teacher.weights == "pretrained" else classes
        teacher, loaded["teacher"] = build_model(
            config.teacher, channels=data.channels, image_size=teacher_size, classes=head, where="teacher"
        )
        teacher_stats = statistics(teacher, config.teacher, data.channels, "teacher")
    # pixels for the larger of the two, so that neither sees a blown-up image
    pixels = data.model_copy(update={"image_size": tuple(map(max, size, teacher_size))})
    images = training_images(split, pixels, config.augment, *student_stats, config.seed)
    _check_batch(config, len(images))
    if train.sync_batchnorm and device.type == "cpu":
        raise UserError("train.sync_batchnorm needs GPUs; torch has it for CUDA only")
    if train.sync_batchnorm:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    distiller = Distiller(
        student,
        teacher,
        config.losses,
        image_size=size,
        teacher_size=teacher_size,
        student_stats=student_stats,
        teacher_stats=teacher_stats,
        student_cuts=config.student.cuts,
        teacher_cuts=config.teacher.cuts if config.teacher else None,
    )
    if train.sync_batchnorm:
        distiller.methods = nn.SyncBatchNorm.convert_sync_batchnorm(distiller.methods)
    distiller.to(device)
    if train.channels_last:
        distiller.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(config, distiller)
    steps_per_epoch = len(images) // train.batch_size
    return Run(
        config,
        device,
        split.classes,
        images,
        validation_images(split, data, config.augment),
        distiller,
        loaded,
        optimizer,
        make_schedule(config, optimizer, steps_per_epoch),
        torch.amp.GradScaler(device.type, enabled=train.precision == "fp16"),
        ModelEmaV3(student, decay=train.ema, use_warmup=True) if train.ema else None,
        make_mixup(config.augment, classes),
        steps_per_epoch,
    )


def _check_head(folder: str, classes: list[str]) -> None:
    theirs = read_head(resolve(folder), "teacher.head")[0].classes
    if theirs != classes:
        odd = next((f"{a} there, {b} here" for a, b in zip(theirs, classes) if a != b), f"{len(theirs)} there")
        raise UserError(
            f"teacher.head: {folder} was fitted for other classes than the data's {len(classes)}: {printable(odd)}. "
            "Fit a head for these classes: scalekd head"
        )


def _check_batch(config: Config, images: int) -> None:
    train, parts = config.train, config.train.accumulate * parallel.world()
    if images < train.batch_size:
        raise UserError(f"train.batch_size {train.batch_size} is more than the {images} training images; lower it")
    if train.batch_size % parts:
        raise UserError(
            f"train.batch_size {train.batch_size} does not divide among {parallel.world()} processes x "
            f"{train.accumulate} accumulated steps; make it a multiple of {parts}"
        )
    if train.batch_size == parts:
        raise UserError("one image per process and step: batch normalisation needs two or more; raise train.batch_size")
    if (config.augment.mixup or config.augment.cutmix) and train.batch_size // parts % 2:
        raise UserError(
            f"mixup pairs images: {train.batch_size // parts} per process and step is odd; change train.batch_size"
        )
