"""From a recipe to everything that its run needs: data, models, methods, optimiser, schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim import Optimizer

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.common.sections import height_and_width
from scalekd.common.seeds import seed_everything
from scalekd.common.text import printable
from scalekd.config.losses import reads_logits
from scalekd.config.recipe import Config
from scalekd.data.batches import (
    training_images,
    validation_images,
)
from scalekd.data.samplers import Mix
from scalekd.data.split import open_split
from scalekd.data.transforms import make_mixup
from scalekd.models.build import build_model
from scalekd.models.class_order import put_in_order
from scalekd.models.create import create, resolve
from scalekd.models.fitted_head import read_head
from scalekd.models.inputs import statistics
from scalekd.models.inputs import statistics as input_statistics
from scalekd.train.optim import create_optimizer, make_schedule
from scalekd.train.run import check_batch_size, scaler_and_average

from .compiled import compile_step
from .distiller import Distiller
from .run import DistillationRun, gives_embeddings, logit_losses


def build(config: Config, device: torch.device) -> DistillationRun:
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
        where = config.key_of(name)
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
    steps_per_epoch, mix = steps_of_an_epoch(config, len(images), split.labelled)
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
    return DistillationRun(
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


def _check_outputs(config: Config, teacher: str, model: nn.Module, classes: int) -> None:
    spec, where, outputs = config.all_teachers[teacher], config.key_of(teacher), getattr(model, "num_classes", 0)
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


def steps_of_an_epoch(
    config: Config, images: int, labelled: int, processes: int | None = None
) -> tuple[int, Mix | None]:
    """Steps of an epoch, and how labelled and unlabelled images share its batches if the data have both.

    images: training images, of which the first `labelled` have labels. processes: of the run; those of the current one
    by default. Raises `UserError` for a batch size that does not fit.
    """
    batch_size, processes = config.train.batch_size, processes or parallel.world()
    mix = _mix_of(config, images, labelled, processes)
    _check_batch(config, images, mix, processes)
    if mix is None:
        return images // batch_size, None
    # an epoch lasts until both kinds of images were used
    return max(1, labelled // mix.per_batch, (images - labelled) // (batch_size - mix.per_batch)), mix


def _mix_of(config: Config, images: int, labelled: int, processes: int) -> Mix | None:
    train, parts = config.train, config.train.accumulate * processes
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


def _check_batch(config: Config, images: int, mix: Mix | None, processes: int) -> None:
    train, parts = config.train, config.train.accumulate * processes
    check_batch_size(train, images if mix is None else None, processes)
    if train.batch_size == parts:
        raise UserError("one image per process and step: batch normalisation needs two or more; raise train.batch_size")
    labelled = mix.per_batch if mix else 0
    for count, kind in ((labelled // parts, "labelled "), ((train.batch_size - labelled) // parts, "")):
        if (config.augment.mixup or config.augment.cutmix) and count % 2:
            raise UserError(
                f"mixup pairs images: {count} {kind}per process and step is odd; change train.batch_size"
                + " or data.unlabelled_share" * bool(mix)
            )


# ---------------------------------------------------------------- the models


def untrained(config: Config, classes: int, losses: Mapping[str, dict[str, Any]], teacher: bool = True) -> Distiller:
    """What the recipe trains, with initial values in place of any weights. Raises `UserError`.

    teacher: False leaves it out, for losses that need none.
    """
    if config.teachers:
        raise UserError(f"the cost is counted for one teacher, and the recipe has {', '.join(config.teachers)}")
    size, channels, spec = height_and_width(config.data.image_size), config.data.channels, config.teacher
    given: dict[str, Any] = {"in_chans": channels}
    of_data = given | {"num_classes": classes}
    of_student = given | {"num_classes": classes if any(map(reads_logits, losses)) else 0}
    student, _ = create(config.student.model, size, False, of_student | config.student.kwargs, "student")
    student_stats = input_statistics(student, config.student, channels, "student")
    if spec is None or not teacher:
        return Distiller(
            student, None, losses, image_size=size, student_stats=student_stats, student_cuts=config.student.cuts
        )
    if spec.weights != "pretrained" or spec.head:  # else it keeps the head that it came with, as in training
        given = of_data
    teacher_size = height_and_width(spec.image_size or size)
    model, _ = create(spec.model, teacher_size, False, given | spec.kwargs, "teacher")
    return Distiller(
        student,
        model,
        losses,
        image_size=size,
        teacher_size=teacher_size,
        student_stats=student_stats,
        teacher_stats=input_statistics(model, spec, channels, "teacher"),
        student_cuts=config.student.cuts,
        teacher_cuts=spec.cuts,
    )


def make_optimizer(config: Config, distiller: Distiller) -> Optimizer:
    """The student at `optim.lr`, the methods' own parameters at `optim.projector_lr` times that."""
    optim = config.optim
    groups = _groups(distiller.student, config, optim.lr) + _groups(
        distiller.methods, config, optim.lr * optim.projector_lr
    )
    return create_optimizer(optim, groups)


def _groups(module: nn.Module, config: Config, lr: float) -> list[dict[str, Any]]:
    decay = config.optim.weight_decay
    if config.optim.decay_norm_and_bias:
        groups = [{"params": [p for p in module.parameters() if p.requires_grad], "weight_decay": decay}]
    else:
        exempt: Iterable[str] = getattr(module, "no_weight_decay", tuple)()
        groups = param_groups_weight_decay(module, decay, no_weight_decay_list=exempt)
    return [group | {"lr": lr} for group in groups if group["params"]]
