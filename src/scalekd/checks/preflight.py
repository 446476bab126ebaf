"""What is checked before step 1: a screen that a person reads in ten seconds."""

from __future__ import annotations

from rich.console import Console

from scalekd.common import parallel
from scalekd.common.sections import height_and_width
from scalekd.distill.run import DistillationRun, Taught, gives_embeddings

from .model import Check, from_source, shown, unseen_pixels
from .step import finish
from .teacher import class_names, teacher_accuracy, teacher_input


def preflight(run: DistillationRun, console: Console) -> None:
    """Prints every check; raises `UserError` with the fixes when one fails. Leaves the run as it found it."""
    checks = [*_weights(run), *_classes(run), *_unlabelled(run), *_inputs(run)]
    if not any(c.status == "fail" for c in checks):
        checks += [check for of in run.taught_by for check in teacher_accuracy(run, of)]
    if run.config.train.compile and parallel.rank() == 0:
        console.print("Pre-flight: the first step is compiled now; that takes a minute or more", highlight=False)
    names = ", ".join(of.teacher.view.name for of in run.taught_by)
    teacher = f" <- {names}" if names else ""
    finish(run, f"{run.distiller.student_view.name}{teacher}  ({', '.join(run.config.losses)})", checks, console)


def _weights(run: DistillationRun) -> list[Check]:
    checks = []
    models = [(of.label, of.place, of.spec, of.loaded) for of in run.taught_by]
    for role, place, spec, loaded in (*models, ("student", "student", run.config.student, run.loaded["student"])):
        name = f"{role} weights"
        if loaded.source != "random":
            checks.append(from_source(role, place, loaded))
        elif place == "student":
            checks.append(Check(name, "ok", "initial values, from seed " + str(run.config.seed)))
        elif spec.weights == "random":
            checks.append(Check(name, "warn", "random, as the recipe asks: it knows nothing"))
        else:
            checks.append(
                Check(
                    name,
                    "fail",
                    "none are named",
                    f"Set {place}.weights=pretrained, or to a file; {place}.weights=random if you mean it",
                )
            )
    return checks


def _classes(run: DistillationRun) -> list[Check]:
    student, data = run.distiller.student_view.shapes.classes, len(run.classes)
    told = f"data {data}, student {student}"
    if not run.has_classifier:
        told = f"data {data}; no loss reads the student's logits: it has no classifier, and its features are validated"
    elif student != data:
        return [Check("classes", "fail", told, f"Leave num_classes out of student.kwargs, or set it to {data}")]
    return [_teachers_classes(run, of, told) for of in run.taught_by] or [Check("classes", "ok", told)]


def _teachers_classes(run: DistillationRun, of: Taught, told: str) -> Check:
    count = of.teacher.view.shapes.classes
    embedding = gives_embeddings(of.spec, count, len(run.classes))
    if embedding or count != len(run.classes):  # methods that compare logits have refused it when they were built
        label = of.label if of.place != "teacher" else "the teacher"
        others = f"{label}'s {count} classes are others" if count else f"{label} has no classifier"
        if embedding:
            others = f"{label}'s {count} outputs are an embedding, not classes"
        return Check("classes", "ok", f"{told}; {others}, only its features are used")
    return class_names(run, of, f"{told}, {of.label} {count}")


def _unlabelled(run: DistillationRun) -> list[Check]:
    """What a step is made of, where there are images without labels."""
    labelled, train = run.train_images.labelled, run.config.train
    rest = len(run.train_images) - labelled
    if not rest:
        return []
    told = f"{rest} without labels"
    if run.mix is not None:
        told += f", {labelled} with; {train.batch_size - run.mix.per_batch} and {run.mix.per_batch} a step"
        reading = [name for name, m in run.distiller.methods.items() if getattr(m, "needs_targets", False)]
        told += f"; only those with are seen by {', '.join(reading)}" if reading else "; no loss reads labels"
    return [Check("images", "ok", told)]


def _inputs(run: DistillationRun) -> list[Check]:
    d = run.distiller
    height, width = height_and_width(run.config.data.image_size)
    checks = [Check("student input", "ok", f"{height}x{width}, {shown(d.student_mean, d.student_std)}")]
    checks += unseen_pixels("student", "data", d.student, (height, width))
    for of in run.taught_by:
        t = of.teacher
        other = ", from the same augmented pixels" if t.size != d.image_size else ""
        told = f"{t.size[0]}x{t.size[1]}{other}, {shown(t.mean, t.std)}"
        checks.append(teacher_input(run, of, told))
        checks += unseen_pixels(of.label, of.place, t.view.model, t.size)
    return checks
