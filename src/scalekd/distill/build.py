"""Builds a distillation run from a recipe: data, models, methods, optimiser, schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim import Optimizer

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.common.sections import height_and_width
from scalekd.common.seeds import seed_everything
from scalekd.common.text import counted, printable
from scalekd.config.fields import Balance as BalanceOptions
from scalekd.config.losses import label_problems, reads_logits, reads_pooled
from scalekd.config.recipe import Config
from scalekd.data.batches import (
    training_images,
    validation_images,
)
from scalekd.data.samplers import Mix
from scalekd.data.split import Split, drawing_weights, open_split
from scalekd.data.transforms import make_mixup
from scalekd.heads.retrieval import RANKS, without_relevant
from scalekd.models.build import build_model
from scalekd.models.class_order import put_in_order
from scalekd.models.create import create, resolve
from scalekd.models.embedding_head import add_embedding_head
from scalekd.models.fitted_head import read_head
from scalekd.models.inputs import Statistics, statistics
from scalekd.models.stages import Shapes
from scalekd.models.weights.trained import Loaded
from scalekd.train.hardware import for_device
from scalekd.train.optim import create_optimizer, make_schedule
from scalekd.train.run import check_batch_size, scaler_and_average

from .balance import Balance, Gradients
from .compiled import compile_step
from .distiller import Distiller
from .levers import move, reshape_step
from .quantised import calibration_images, fake_quantise, load_methods
from .run import DistillationRun, gives_embeddings, logit_losses, retrieval_wanted


def build(config: Config, device: torch.device, strict: bool = True) -> DistillationRun:
    """Opens the data and builds models, methods, optimiser and schedule. Raises `UserError`.

    strict: as for `open_split`. False is for a run whose checkpoint is loaded next.
    """
    config = for_device(config, device)
    seed_everything(config.seed, "models")  # models and methods draw their initial values in this order
    data, train = config.data, config.train
    split = open_split(data, strict)
    if faults := label_faults(config, split):
        raise UserError("\n".join(faults))
    size, classes = height_and_width(data.image_size), len(split.classes)
    head = classes if any(map(reads_logits, config.losses)) else 0
    student, student_loaded = build_model(
        config.student, channels=data.channels, image_size=size, classes=head, where="student"
    )
    if not head and not any(map(reads_pooled, config.losses)):
        _check_backbone(student, config.student.model)
    student_stats = statistics(student, config.student, data.channels, "student")
    teachers = _build_teachers(config, split.classes)
    # load images at the largest input size, so that no model gets upsampled pixels
    pixels = data.model_copy(update={"image_size": tuple(map(max, zip(size, *teachers.sizes.values())))})
    images = training_images(split, pixels, config.augment, *student_stats, config.seed)
    steps_per_epoch, mix = steps_of_an_epoch(config, len(images), split.labelled)
    distiller = _build_distiller(config, student, student_stats, teachers, device)
    _check_embedding(config, distiller.student_view.shapes, split, strict)
    if config.quantize:
        fake_quantise(distiller, config, config.quantize, calibration_images(split, config))
        if strict:
            load_methods(distiller, config.quantize)
    optimizer = make_optimizer(config, distiller)
    return DistillationRun(
        config=config,
        device=device,
        classes=split.classes,
        train_images=images,
        val_images=validation_images(split, data, config.augment),
        model=distiller,
        loaded={"student": student_loaded, **teachers.loaded},
        optimizer=optimizer,
        schedule=make_schedule(config, optimizer, steps_per_epoch),
        mixup=make_mixup(config.augment, classes, split.multi_label and split.labelled > 0),
        steps_per_epoch=steps_per_epoch,
        mix=mix,
        repeats=config.augment.repeats,
        weights=drawing_weights(split, data),
        described=split.described,
        **scaler_and_average(train, distiller.student, device),
    )


def label_faults(config: Config, split: Split) -> list[str]:
    """A line for all that does not suit the labels of the images: sets of classes, or one class each."""
    problems = label_problems(config.losses, split.multi_label)
    if split.multi_label and not any(map(reads_logits, config.losses)):
        problems.append(
            "losses: none uses the student's logits, so it would have no classifier; with sets of labels validation needs "
            "one: add bce or asl"
        )
    return problems


class _Teachers(NamedTuple):
    """The teachers of a recipe, by name; `loaded` by recipe key."""

    models: dict[str, nn.Module]
    sizes: dict[str, tuple[int, int]]
    stats: dict[str, Statistics]
    loaded: dict[str, Loaded]


def _build_teachers(config: Config, classes: list[str]) -> _Teachers:
    size, channels = height_and_width(config.data.image_size), config.data.channels
    teachers = _Teachers({}, {}, {}, {})
    for name, spec in config.all_teachers.items():
        key = config.key_of(name)
        if spec.has_head_folder:
            _check_head(str(spec.head), classes, key)
        own = None if spec.weights == "pretrained" else len(classes)
        teachers.sizes[name] = height_and_width(spec.image_size or size)
        model, teachers.loaded[key] = build_model(
            spec, channels=channels, image_size=teachers.sizes[name], classes=own, where=key
        )
        teachers.models[name] = model
        if spec.classes is not None:
            put_in_order(model, spec.classes, classes, key)
        _check_outputs(config, name, model, len(classes))
        teachers.stats[name] = statistics(model, spec, channels, key)
    return teachers


def _build_distiller(
    config: Config, student: nn.Module, student_stats: Statistics, teachers: _Teachers, device: torch.device
) -> Distiller:
    train = config.train
    if train.sync_batchnorm and device.type == "cpu":
        raise UserError("train.sync_batchnorm needs a GPU; torch supports it on CUDA only")
    if train.sync_batchnorm:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    distiller = Distiller(
        student,
        teachers.models,
        config.losses,
        image_size=height_and_width(config.data.image_size),
        teacher_size=teachers.sizes,
        student_stats=student_stats,
        teacher_stats=teachers.stats,
        student_cuts=config.student.cuts,
        teacher_cuts={name: spec.cuts for name, spec in config.all_teachers.items()},
        teacher_top_k={name: spec.top_k for name, spec in config.all_teachers.items()},
    )
    if train.sync_batchnorm:
        distiller.methods = nn.SyncBatchNorm.convert_sync_batchnorm(distiller.methods)
    if config.balance and len(distiller.methods) > 1:
        distiller.gradients = gradients_for(config.balance, distiller)
    reshape_step(distiller, config)
    move(distiller, config, device)
    if train.compile:
        compile_step(distiller, train.batch_size // (train.accumulate * parallel.world()), train.cuda_graphs)
    return distiller


def gradients_for(options: BalanceOptions, distiller: Distiller) -> Gradients:
    """What measures the gradients of the losses and, unless `balance.adjust` is false, weights those on maps by them.

    The weights of the losses then move there from the distiller.
    """
    weights = dict(distiller.weights)
    if not options.adjust:
        return Gradients(weights, options.every, options.momentum)
    distiller.weights = dict.fromkeys(weights, 1.0)
    reference = [name for name in weights if not getattr(distiller.methods[name], "needs_maps", True)]
    return Balance(weights, reference or list(weights)[:1], options.every, options.momentum)


def _check_outputs(config: Config, teacher: str, model: nn.Module, classes: int) -> None:
    """Raises `UserError` if a loss reads a teacher's logits and its outputs are an embedding."""
    spec, where, outputs = config.all_teachers[teacher], config.key_of(teacher), getattr(model, "num_classes", 0)
    losses = logit_losses(config, teacher)
    if losses and gives_embeddings(spec, outputs, classes):
        raise UserError(
            f"losses.{losses[0]}: the {outputs} outputs of {where}, {spec.model}, are an embedding, not classes. Fit a "
            f"classifier with `scalekd head` and set {where}.head, or use feature methods: scalekd, fd"
        )


def _check_backbone(student: nn.Module, name: str) -> None:
    """Raises `UserError` for a student without a classifier in which a layer would stay untrained."""
    hidden, features = getattr(student, "head_hidden_size", None), getattr(student, "num_features", None)
    if hidden != features:
        raise UserError(
            f"student.model: no loss uses the student's logits, so the layer between {name}'s last map and its classifier "
            f"({features} to {hidden} channels) would stay untrained. Add fm, which trains it, or a loss on logits, such as "
            "kd with a teacher that has a classifier for your classes, or choose a student without such a layer, such as a "
            "ResNet"
        )


def _check_embedding(config: Config, student: Shapes, split: Split, strict: bool) -> None:
    """Raises `UserError` if the run is about embeddings and the student has none, or if too few images query each other.

    strict: False for a run that was trained so.
    """
    if not retrieval_wanted(config):
        return
    if not student.pooled:
        raise UserError(
            f"student.model: {student.model} has no single vector of pooled features before one classifier, so it gives no "
            "embedding; choose another student, such as a ResNet, a MobileNet or a ViT"
        )
    most, images = max(RANKS), len(split.val_indices)
    if strict and not split.multi_label and images <= most:
        raise UserError(
            f"{counted(images, 'validation image')}: recall@{most} needs {most + 1} or more that query each other; name more with "
            "data.val, or raise data.val_fraction"
        )
    if (
        strict
        and not split.multi_label
        and without_relevant([split.val.targets[i] for i in split.val_indices]) == images
    ):
        raise UserError(
            "no class has two validation images, so none can find another of its class; name more with data.val"
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
    # an epoch ends when labelled and unlabelled images have all been used
    return max(1, labelled // mix.per_batch, (images - labelled) // (batch_size - mix.per_batch)), mix


def _mix_of(config: Config, images: int, labelled: int, processes: int) -> Mix | None:
    """How labelled and unlabelled images share a batch; None if there is one kind. Raises `UserError`."""
    train, parts = config.train, config.train.accumulate * processes
    if labelled in (0, images):
        return None
    share, part = config.data.unlabelled_share, train.batch_size // parts
    unlabelled = round(part * share)
    if unlabelled in (0, part):
        raise UserError(
            f"data.unlabelled_share {share:g} of {part} images per process and step is {unlabelled}: a step needs images "
            "with and without labels; change the share, or raise train.batch_size"
        )
    return Mix(labelled, (part - unlabelled) * parts)


def _check_head(folder: str, classes: list[str], where: str) -> None:
    """Raises `UserError` if a head was fitted for other classes than the data's."""
    theirs = read_head(resolve(folder), f"{where}.head")[0].classes
    if theirs != classes:
        first = next((f"{a} there, {b} here" for a, b in zip(theirs, classes) if a != b), f"{len(theirs)} there")
        raise UserError(
            f"{where}.head: {folder} was fitted for other classes than the data's {len(classes)}: {printable(first)}. "
            "Fit a head for the data's classes with `scalekd head`"
        )


def _check_batch(config: Config, images: int, mix: Mix | None, processes: int) -> None:
    """Raises `UserError` if the batch size does not suit the number of processes, batch norms or Mixup."""
    train, parts = config.train, config.train.accumulate * processes
    check_batch_size(train, images if mix is None else None, processes)
    if train.batch_size == parts:
        raise UserError("one image per process and step: batch normalisation needs two or more; raise train.batch_size")
    labelled = mix.per_batch if mix else 0
    for count, kind in ((labelled // parts, "labelled "), ((train.batch_size - labelled) // parts, "")):
        if (config.augment.mixup or config.augment.cutmix) and count % 2:
            raise UserError(
                f"augment.mixup and augment.cutmix need an even number of {kind}images per process and step, not {count}; "
                f"change train.batch_size{' or data.unlabelled_share' * bool(mix)}"
            )


def untrained(config: Config, classes: int, losses: Mapping[str, dict[str, Any]], teacher: bool = True) -> Distiller:
    """The recipe's distiller with initial values instead of trained weights, to count and time its step. It measures nothing.

    Args:
        classes: number of classes of the data.
        losses: as in a recipe, instead of the recipe's own.
        teacher: False builds no teacher; the losses must not need one.

    Raises:
        UserError: several teachers, or models that cannot be built.
    """
    if config.teachers:
        raise UserError(f"costs are counted for one teacher and the recipe has several: {', '.join(config.teachers)}")
    size, channels, spec = height_and_width(config.data.image_size), config.data.channels, config.teacher
    inputs: dict[str, Any] = {"in_chans": channels}
    outputs = {"num_classes": classes if any(map(reads_logits, losses)) else 0}
    student, _ = create(config.student.model, size, False, inputs | outputs | config.student.kwargs, "student")
    if config.student.embedding:
        add_embedding_head(student, config.student.embedding)
    student_stats = statistics(student, config.student, channels, "student")
    if spec is None or not teacher:
        alone = Distiller(
            student, None, losses, image_size=size, student_stats=student_stats, student_cuts=config.student.cuts
        )
        reshape_step(alone, config)
        return alone
    # pre-trained weights keep their own classifier, as in training
    outputs = {"num_classes": classes} if spec.weights != "pretrained" or spec.head else {}
    teacher_size = height_and_width(spec.image_size or size)
    model, _ = create(spec.model, teacher_size, False, inputs | outputs | spec.kwargs, "teacher")
    if spec.embedding:
        add_embedding_head(model, spec.embedding)
    distiller = Distiller(
        student,
        model,
        losses,
        image_size=size,
        teacher_size=teacher_size,
        student_stats=student_stats,
        teacher_stats=statistics(model, spec, channels, "teacher"),
        student_cuts=config.student.cuts,
        teacher_cuts=spec.cuts,
    )
    reshape_step(distiller, config)
    distiller.skip_measuring()
    return distiller


def make_optimizer(config: Config, distiller: Distiller) -> Optimizer:
    """The optimiser: the student at `optim.lr`, the parameters of the methods at `optim.projector_lr` times that."""
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
