"""The pre-flight screen of a distillation run: weights, classes, inputs, teacher accuracy and one training step."""

from __future__ import annotations

import contextlib

import numpy as np
from rich.console import Console

from scalekd.common.sections import height_and_width
from scalekd.common.text import counted
from scalekd.data.images import BadImage
from scalekd.distill.run import DistillationRun, Taught, gives_embeddings
from scalekd.heads.retrieval import without_relevant

from .gradients import gradient_check, length_check
from .model import Check, from_source, licence_check, shown, unseen_pixels, untrained_teacher
from .step import Screen
from .teacher import class_names, teacher_accuracy, teacher_input

SAMPLE = 16  # training images that are looked at
DARK = 64  # of 255: a sample without a brighter pixel is nearly black; 12-bit values in 16 bits end at 16


def preflight(run: DistillationRun, console: Console) -> None:
    """Prints all checks. Raises `UserError` with the fixes if one fails. Does not change the run."""
    names = ", ".join(taught.teacher.view.name for taught in run.taught_by)
    teacher = f" <- {names}" if names else ""
    screen = Screen(f"{run.distiller.student_view.name}{teacher}  ({', '.join(run.config.losses)})", console)
    for checks in (_weights, _classes, _unlabelled, _queries, _pixels, _inputs):
        screen.show(checks(run))
    if not screen.failed:
        for taught in run.taught_by:
            screen.doing(f"{taught.label}: a sample of the validation images")
            screen.show(teacher_accuracy(run, taught))
    if not screen.failed and (steps := run.steps_to_measure):
        images = steps * run.config.train.batch_size
        screen.doing(f"the statistics of the teachers' features on the first {images} images")
        run.prepare()
    if run.config.train.compile and not screen.failed:
        screen.doing("compiling the first step, which takes a minute or more")
    screen.finish(run)
    if len(run.distiller.methods) > 1:
        screen.doing("the gradient of each loss")
        screen.show([gradient_check(run)])
    screen.show(length_check(run))


def _weights(run: DistillationRun) -> list[Check]:
    checks = []
    models = [(taught.label, taught.place, taught.spec, taught.loaded) for taught in run.taught_by]
    for role, key, spec, loaded in (*models, ("student", "student", run.config.student, run.loaded["student"])):
        name = f"{role} weights"
        if loaded.source != "random":
            checks += [from_source(role, key, loaded), *licence_check(role, loaded)]
        elif key == "student":
            checks.append(Check(name, "ok", f"initial values, from seed {run.config.seed}"))
        elif spec.weights == "random":
            checks.append(untrained_teacher(name, key))
        else:
            checks.append(
                Check(
                    name,
                    "fail",
                    f"{key}.weights is not set",
                    f"Set {key}.weights to `pretrained` or to a file, or to `random` to use initial values",
                )
            )
    return checks


def _classes(run: DistillationRun) -> list[Check]:
    student, data = run.distiller.student_view.shapes.classes, len(run.classes)
    text = f"data {data}, student {student}"
    if not run.has_classifier:
        text = f"data {data}; no loss uses the student's logits: it has no classifier, and validation uses its features"
    elif student != data:
        return [Check("classes", "fail", text, f"Remove num_classes from student.kwargs, or set it to {data}")]
    return [_teacher_classes(run, taught, text) for taught in run.taught_by] or [Check("classes", "ok", text)]


def _teacher_classes(run: DistillationRun, taught: Taught, text: str) -> Check:
    """text: numbers of classes so far; the teacher's is appended."""
    count = taught.teacher.view.shapes.classes
    embedding = gives_embeddings(taught.spec, count, len(run.classes))
    if embedding or count != len(run.classes):  # methods that compare logits already rejected it when they were built
        label = taught.label if taught.place != "teacher" else "the teacher"
        reason = f"{label} has {count} other classes" if count else f"{label} has no classifier"
        if embedding:
            reason = f"{label}'s {count} outputs are an embedding, not classes"
        return Check("classes", "ok", f"{text}; {reason}: only its features are used")
    return class_names(run, taught, f"{text}, {taught.label} {count}")


def _unlabelled(run: DistillationRun) -> list[Check]:
    """How many images without labels there are, and how many of each kind are in a step."""
    labelled, train = run.train_images.labelled, run.config.train
    rest = len(run.train_images) - labelled
    if not rest:
        return []
    text = f"{rest} unlabelled"
    if run.mix is not None:
        text = f"{labelled} labelled, {rest} unlabelled"
        text += f"; per step {run.mix.per_batch} labelled, {train.batch_size - run.mix.per_batch} unlabelled"
        reading = [name for name, m in run.distiller.methods.items() if getattr(m, "needs_targets", False)]
        text += f"; losses that use labels: {', '.join(reading) or 'none'}"
    return [Check("images", "ok", text)]


def _queries(run: DistillationRun) -> list[Check]:
    """How many validation images query each other, in a run with figures of retrieval."""
    if not run.retrieves:
        return []
    images = run.val_images
    alone = without_relevant([images.source.targets[i] for i in images.indices])
    text = f"{len(images) - alone} validation images query each other"
    if alone:
        text += f"; {counted(alone, 'image')} of classes with one image left out of the figures"
    return [Check("retrieval", "ok", text)]


def _pixels(run: DistillationRun) -> list[Check]:
    """A warning if a sample of the training images is nearly black."""
    images, highest = run.train_images, list[int]()
    step = max(1, len(images) // SAMPLE)
    for i in images.indices[::step][:SAMPLE]:
        with contextlib.suppress(BadImage):  # reported when it is used
            highest.append(np.asarray(images.source[i][0]).max().item())
    if not highest or max(highest) >= DARK:
        return []
    return [
        Check(
            "images",
            "warn",
            f"the largest value in a sample of the training images is {max(highest)} of 255: they are nearly black",
            "16-bit files with 10- or 12-bit values look like this; scale them to the full range",
        )
    ]


def _inputs(run: DistillationRun) -> list[Check]:
    d = run.distiller
    height, width = height_and_width(run.config.data.image_size)
    checks = [Check("student input", "ok", f"{height}x{width}, {shown(d.student_mean, d.student_std)}")]
    checks += unseen_pixels("student", "data", d.student, (height, width))
    for taught in run.taught_by:
        t = taught.teacher
        resized = ", resized from the student's augmented images" if t.size != d.image_size else ""
        held = f", weights held in {taught.spec.precision}" if taught.spec.precision else ""
        text = f"{t.size[0]}x{t.size[1]}{resized}, {shown(t.mean, t.std)}{held}"
        checks.append(teacher_input(run, taught, text))
        checks += unseen_pixels(taught.label, taught.place, t.view.model, t.size)
    return checks
