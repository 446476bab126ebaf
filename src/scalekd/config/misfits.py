"""What does not go together in a recipe, and what it sets that nothing would read; each a line for people."""

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

Idle = tuple[
    bool, str, "Section", str
]  # whether a field is not read, its name, the section it is in, what it goes with


def misfits(config: Recipe) -> list[str]:
    """All of them, but for what is wrong with an assistant's recipe."""
    problems = _unlabelled(config)
    needing = [n for n in config.losses if reads_teacher(n)]
    if needing and not config.all_teachers:
        problems.append(f"losses: {', '.join(needing)} need(s) a teacher; add `teacher: {{model: ..., weights: ...}}`")
    if not needing and config.teacher is not None:
        problems.append("teacher: no loss uses it; add one (kd, scalekd, ...) or remove the teacher")
    problems += _several_teachers(config, needing)
    problems += _heads(config)
    problems += [
        f"{config.key_of(name)}.classes: its head's names are the data's; leave it out"
        for name, spec in config.all_teachers.items()
        if spec.classes is not None and spec.head is not None
    ]
    if config.train.batch_size % config.train.accumulate:
        problems.append(
            f"train.batch_size {config.train.batch_size} is not a multiple of train.accumulate {config.train.accumulate}"
        )
    if config.schedule.warmup_epochs >= config.train.epochs:
        problems.append(
            f"schedule.warmup_epochs {config.schedule.warmup_epochs:g} leaves nothing of train.epochs {config.train.epochs}; "
            "for a short trial add schedule.warmup_epochs=0"
        )
    return problems + _ignored(config)


def _several_teachers(config: Recipe, needing: list[str]) -> list[str]:
    """What is wrong with several teachers and with the losses that choose among them."""
    chosen = {name: options["teachers"] for name, options in config.losses.items() if "teachers" in options}
    if not config.teachers:
        return [f"losses.{name}.teachers: goes with several teachers, `teachers: {{NAME: ...}}`" for name in chosen]
    if config.teacher is not None:
        return ["teacher: there are `teachers` too; put it among them, or remove them"]
    problems = []
    for name, teachers in chosen.items():
        if name not in needing:
            problems.append(f"losses.{name}.teachers: {name} reads no teacher")
        problems += [
            f"losses.{name}.teachers: no teacher `{shortened(of)}`.{nearest(of, config.teachers)}"
            for of in teachers
            if of not in config.teachers
        ]
        if not teachers:
            problems.append(f"losses.{name}.teachers: names none; leave it out for all of them")
    used = {of for name in needing for of in chosen.get(name, config.teachers)}
    return problems + [f"teachers.{of}: no loss uses it; remove it" for of in config.teachers if of not in used]


def _heads(config: Recipe) -> list[str]:
    if config.data.train is not None:
        return []
    return [
        f"{config.key_of(name)}.head: fit needs labelled images, a data.train; name some, or the folder of a head "
        "(`scalekd head`)"
        for name, spec in config.all_teachers.items()
        if spec.fits_head
    ]


def _unlabelled(config: Recipe) -> list[str]:
    from scalekd.methods.names import METHODS

    data, problems = config.data, []
    if data.train is None and data.unlabelled is None:
        return ["data.train: missing; or name images without labels, data.unlabelled"]
    if data.train is None:
        if labels := [n for n in config.losses if getattr(METHODS[n], "needs_targets", False)]:
            problems.append(
                f"losses: {', '.join(labels)} need(s) labels; name a data.train, or turn off: losses.{labels[0]}=off"
            )
        if data.val is None:
            problems.append(
                "data.val: without a data.train, some labelled images are needed to validate on; some hundreds do"
            )
        if data.unlabelled == "rest":
            problems.append("data.unlabelled: rest is what data.limit leaves out of data.train; name a data.train")
    elif data.unlabelled == "rest" and data.limit is None:
        problems.append("data.unlabelled: rest is what data.limit leaves out of data.train; set data.limit")
    if data.unlabelled is not None and config.augment.repeats > 1:
        problems.append("augment.repeats: goes with labelled images only; leave it out, or data.unlabelled")
    return problems


def _ignored(config: Recipe) -> list[str]:
    """Values that were changed and that nothing would read."""
    augment, schedule = config.augment, config.schedule
    return unread(config.optim) + without_effect(
        [
            (augment.crop != "random_resized", "augment.scale", augment, "augment.crop: random_resized"),
            (augment.crop != "pad", "augment.pad", augment, "augment.crop: pad"),
            (
                augment.auto_augment is not None,
                "augment.color_jitter",
                augment,
                "no augment.auto_augment, which brings its own",
            ),
            *idle_in(schedule),
            (config.data.on_bad_image == "error", "data.max_bad", config.data, "data.on_bad_image: skip"),
            (config.data.val is not None, "data.val_fraction", config.data, "no data.val"),
            (
                config.data.val is not None and config.data.limit is None and config.data.unlabelled_limit is None,
                "data.seed",
                config.data,
                "data.limit or no data.val; a run's own seed is `seed`",
            ),
            (
                config.data.train is None,
                "data.limit",
                config.data,
                "a data.train; data.unlabelled_limit is the other's",
            ),
            (config.data.unlabelled is None, "data.unlabelled_limit", config.data, "data.unlabelled"),
            (
                config.data.unlabelled is None or config.data.train is None,
                "data.unlabelled_share",
                config.data,
                "both data.train and data.unlabelled",
            ),
            (True, "student.image_size", config.student, "a teacher; the student's is data.image_size"),
            (True, "student.top1", config.student, "a teacher"),
            (True, "student.head", config.student, "a teacher"),
            (True, "student.classes", config.student, "a teacher"),
        ]
    )


def idle_in(schedule: Schedule) -> list[Idle]:
    """The fields that a schedule of its kind does not read."""
    return [
        (schedule.name != "multistep", "schedule.milestones", schedule, "schedule.name: multistep"),
        (schedule.name != "multistep", "schedule.decay_rate", schedule, "schedule.name: multistep"),
        (schedule.name != "cosine", "schedule.min_lr", schedule, "schedule.name: cosine"),
        (schedule.warmup_epochs == 0, "schedule.warmup_lr", schedule, "schedule.warmup_epochs above 0"),
    ]


def unread(optim: BaseOptim) -> list[str]:
    """Values of `optim` that were changed and that its optimiser does not have."""
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
    return [
        f"{name}: has no effect here; it goes with {needs}"
        for not_read, name, section, needs in idle
        if not_read and _changed(section, name.split(".")[1])
    ]


def _changed(section: Section, field: str) -> bool:
    return getattr(section, field) != type(section).model_fields[field].default
