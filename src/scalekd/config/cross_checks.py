"""Checks across the sections of a recipe: conflicting options, and options that have no effect."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from scalekd.common.errors import nearest
from scalekd.common.text import shortened

from .losses import reads_teacher

if TYPE_CHECKING:
    from scalekd.common.sections import Section
    from scalekd.train.options import BaseOptim, Schedule

    from .fields import Recipe

# (whether the field is ignored, `section.field`, that section, the setting with which it has an effect)
Idle = tuple[bool, str, "Section", str]

# fields of a model that a student may not set, and what to use instead
TEACHERS_ONLY = {
    "image_size": "; set data.image_size", "top1": "", "head": "", "classes": "", "precision": "; set train.precision",
    "top_k": "",
}  # fmt: skip


def cross_checks(config: Recipe) -> list[str]:
    """One line per problem. Problems of the assistant's own recipe are not among them."""
    problems = _unlabelled(config)
    needing = [name for name in config.losses if reads_teacher(name)]
    if needing and not config.all_teachers:
        problems.append(f"losses: {', '.join(needing)} need(s) a teacher; add `teacher: {{model: ..., weights: ...}}`")
    if not needing and config.teacher is not None:
        problems.append("teacher: no loss uses it; add one that does (kd, scalekd, ...) or remove the teacher")
    problems += _several_teachers(config, needing)
    problems += _heads(config)
    problems += [
        f"{config.key_of(name)}.classes: has no effect with a fitted head, whose classes are the data's; remove it"
        for name, spec in config.all_teachers.items()
        if spec.classes is not None and spec.has_head_folder
    ]
    if config.student.embedding is not None and "embed" not in config.losses:
        problems.append(
            "student.embedding: no loss trains it; add embed, which needs a teacher (losses.embed={}), or remove it "
            "(student.embedding=null)"
        )
    if config.train.batch_size % config.train.accumulate:
        problems.append(
            f"train.batch_size {config.train.batch_size} is not a multiple of train.accumulate {config.train.accumulate}"
        )
    if config.schedule.warmup_epochs >= config.train.epochs:
        problems.append(
            f"schedule.warmup_epochs {config.schedule.warmup_epochs:g} must be below train.epochs {config.train.epochs}; "
            "for a short trial set schedule.warmup_epochs=0"
        )
    if "asl" in config.losses and (config.augment.mixup or config.augment.cutmix):
        problems.append(
            "losses.asl: it needs labels of 0 and 1, and augment.mixup and augment.cutmix mix them; remove these, or use bce"
        )
    return problems + _quantize(config) + _step(config) + _ignored(config)


def _step(config: Recipe) -> list[str]:
    """Settings of a step that cannot go together."""
    train, problems = config.train, []
    if train.cuda_graphs and train.accumulate > 1:
        problems.append(
            "train.cuda_graphs: not with train.accumulate above 1, because a graph's next run would overwrite the gradients; "
            "set train.accumulate=1 or train.cuda_graphs=false"
        )
    if train.cuda_graphs and train.streams:
        problems.append(
            "train.cuda_graphs: not with train.streams, because the teacher's graph would overwrite features that the step "
            "before still reads; set one of the two to false"
        )
    if train.compile and train.grad_checkpointing:
        problems.append(
            "train.grad_checkpointing: not with train.compile, which chooses itself what to compute again; set one of the two "
            "to false"
        )
    return problems


def _quantize(config: Recipe) -> list[str]:
    """Settings that a student with the numbers of an int8 file cannot have."""
    if config.quantize is None:
        return []
    train = config.train
    odd = {
        "train.ema": train.ema is not None,
        "train.compile": train.compile,
        "train.grad_checkpointing": train.grad_checkpointing,
        "train.sync_batchnorm": train.sync_batchnorm,
        "train.precision": train.precision != "float32",
        "assistant": config.assistant is not None,
        "student.embedding": config.student.embedding is not None,
    }
    default = {"train.precision": "float32", "train.ema": "null", "assistant": "null", "student.embedding": "null"}
    return [f"{key}: not with `quantize`; set {key}={default.get(key, 'false')}" for key, set_ in odd.items() if set_]


def _several_teachers(config: Recipe, needing: list[str]) -> list[str]:
    """Problems of `teachers`, and of the option `teachers` of a loss."""
    chosen = {name: options["teachers"] for name, options in config.losses.items() if "teachers" in options}
    if not config.teachers:
        return [
            f"losses.{name}.teachers: the recipe has one teacher; remove this option, or use `teachers: {{NAME: ...}}`"
            for name in chosen
        ]
    if config.teacher is not None:
        return ["teacher: the recipe has `teachers` too; move this one there, or remove one of the two"]
    problems = []
    for name, teachers in chosen.items():
        if name not in needing:
            problems.append(f"losses.{name}.teachers: {name} uses no teacher; remove this option")
        problems += [
            f"losses.{name}.teachers: no teacher `{shortened(teacher)}`.{nearest(teacher, config.teachers)}"
            for teacher in teachers
            if teacher not in config.teachers
        ]
        if not teachers:
            problems.append(f"losses.{name}.teachers: is empty; remove it to use all teachers")
    used = {teacher for name in needing for teacher in chosen.get(name, config.teachers)}
    return problems + [f"teachers.{name}: no loss uses it; remove it" for name in config.teachers if name not in used]


def _heads(config: Recipe) -> list[str]:
    if config.data.train is not None:
        return []
    return [
        f"{config.key_of(name)}.head: fit needs labelled images; set data.train, or name the folder of a head that "
        "`scalekd head` fitted"
        for name, spec in config.all_teachers.items()
        if spec.fits_head
    ]


def _unlabelled(config: Recipe) -> list[str]:
    """Problems of recipes with unlabelled images, and of those without any training images."""
    from scalekd.methods.names import METHODS

    data, problems = config.data, []
    if data.train is None and data.unlabelled is None:
        return ["data.train: missing; set it, or set data.unlabelled to train on images without labels"]
    if data.train is None:
        if labels := [name for name in config.losses if getattr(METHODS[name], "needs_targets", False)]:
            problems.append(
                f"losses: {', '.join(labels)} need(s) labels; set data.train, or remove the loss: losses.{labels[0]}=off"
            )
        if data.val is None:
            problems.append("data.val: needed without data.train; name a few hundred labelled images for validation")
        if data.unlabelled == "rest":
            problems.append("data.unlabelled: `rest` is the part of data.train that data.limit leaves; set data.train")
    elif data.unlabelled == "rest" and data.limit is None:
        problems.append("data.unlabelled: `rest` is the part of data.train that data.limit leaves; set data.limit")
    if data.unlabelled is not None and config.augment.repeats > 1:
        problems.append("augment.repeats: works with labelled images only; remove it, or remove data.unlabelled")
    return problems


def _ignored(config: Recipe) -> list[str]:
    """Problems of fields that differ from their default and that the run would ignore."""
    augment, data = config.augment, config.data
    own_val = data.val is not None
    no_limit = data.limit is None and data.unlabelled_limit is None
    one_kind = data.unlabelled is None or data.train is None
    own_jitter = augment.auto_augment is not None
    of_teachers = [
        f"student.{field}: has no effect here; it is an option of teachers{instead}"
        for field, instead in TEACHERS_ONLY.items()
        if _changed(config.student, field)
    ]
    ignored = without_effect(
        [
            (augment.crop != "random_resized", "augment.scale", augment, "augment.crop: random_resized"),
            (augment.crop != "random_resized", "data.decoder", data, "augment.crop: random_resized"),
            (augment.crop != "pad", "augment.pad", augment, "augment.crop: pad"),
            (not config.train.compile, "train.cuda_graphs", config.train, "train.compile: true"),
            (config.train.precision in ("bf16", "fp16"), "train.tf32", config.train, "train.precision: float32"),
            (own_jitter, "augment.color_jitter", augment, "no augment.auto_augment, which has its own"),
            *idle_in(config.schedule),
            (data.on_bad_image == "error", "data.max_bad", data, "data.on_bad_image: skip"),
            (own_val, "data.val_fraction", data, "no data.val"),
            (own_val and no_limit, "data.seed", data, "data.limit or no data.val; the seed of the run is `seed`"),
            (data.train is None, "data.limit", data, "data.train; for data.unlabelled use data.unlabelled_limit"),
            (data.train is None, "data.class_balance", data, "data.train"),
            (data.unlabelled is None, "data.unlabelled_limit", data, "data.unlabelled"),
            (one_kind, "data.unlabelled_share", data, "both data.train and data.unlabelled"),
        ]
    )
    return [*unread(config.optim), *ignored, *of_teachers]


def idle_in(schedule: Schedule) -> list[Idle]:
    """The fields that depend on the kind of schedule, for `without_effect`."""
    return [
        (schedule.name != "multistep", "schedule.milestones", schedule, "schedule.name: multistep"),
        (schedule.name != "multistep", "schedule.decay_rate", schedule, "schedule.name: multistep"),
        (schedule.name != "cosine", "schedule.min_lr", schedule, "schedule.name: cosine"),
        (schedule.warmup_epochs == 0, "schedule.warmup_lr", schedule, "schedule.warmup_epochs above 0"),
    ]


def unread(optim: BaseOptim) -> list[str]:
    """Problems of fields of `optim` that its optimiser does not have."""
    from timm.optim import get_optimizer_info

    info = get_optimizer_info(optim.name)
    return without_effect(
        [
            (not info.has_betas, "optim.betas", optim, "an optimiser with betas"),
            (not info.has_eps, "optim.eps", optim, "an optimiser with eps"),
            (not info.has_momentum, "optim.momentum", optim, "an optimiser with momentum"),
        ]
    )


def without_effect(idle: Iterable[Idle]) -> list[str]:
    """A line for each ignored field whose value is not the default."""
    return [
        f"{name}: has no effect here; it is used only with {needs}"
        for ignored, name, section, needs in idle
        if ignored and _changed(section, name.split(".")[1])
    ]


def _changed(section: Section, field: str) -> bool:
    return getattr(section, field) != type(section).model_fields[field].default
