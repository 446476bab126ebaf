"""What is checked before step 1: a screen that a person reads in ten seconds."""

from __future__ import annotations

import math
import resource
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import parallel
from .build import Run, Taught, gives_embeddings
from .compiled import failures_told
from .config import height_and_width
from .data import seed_everything
from .distiller import dead_parameters
from .engine import AUTOCAST
from .errors import UserError, counted, printable
from .runlog import duration
from .teacher_checks import Check, class_names, from_source, shown, teacher_accuracy, teacher_input, unseen_pixels
from .training import Training


def preflight(run: Run, console: Console) -> None:
    """Prints every check; raises `UserError` with the fixes when one fails. Leaves the run as it found it."""
    checks = [*_weights(run), *_classes(run), *_unlabelled(run), *_inputs(run)]
    if not any(c.status == "fail" for c in checks):
        checks += [check for of in run.taught_by for check in teacher_accuracy(run, of)]
    if run.config.train.compile and parallel.rank() == 0:
        console.print("Pre-flight: the first step is compiled now; that takes a minute or more", highlight=False)
    names = ", ".join(of.teacher.view.name for of in run.taught_by)
    teacher = f" <- {names}" if names else ""
    finish(run, f"{run.distiller.student_view.name}{teacher}  ({', '.join(run.config.losses)})", checks, console)


def finish(run: Training, title: str, checks: list[Check], console: Console) -> None:
    """Adds a step to the checks unless one failed already, prints all; raises `UserError` with the fixes if one fails."""
    if not any(c.status == "fail" for c in checks):
        checks = [*checks, *_one_step(run), *_bad_images(run)]
    if parallel.rank() == 0:
        _print(title, checks, console)
    failed = [c for c in checks if c.status == "fail"]
    if failed:
        raise UserError("pre-flight: " + "\n".join(f"{c.name}: {c.text}. {c.fix}" for c in failed))


def _print(title: str, checks: list[Check], console: Console) -> None:
    console.print(f"Pre-flight: {title}", highlight=False, markup=False)
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(box=None, show_header=False, padding=(0, 1))
    for c in checks:
        text = c.text + (f". {c.fix}" if c.status == "warn" and c.fix else "")
        # Text: a class may be called [red]
        table.add_row(Text(c.status, colours[c.status]), c.name, Text(printable(text)))
    console.print(table, highlight=False)


def _weights(run: Run) -> list[Check]:
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


def _classes(run: Run) -> list[Check]:
    student, data = run.distiller.student_view.shapes.classes, len(run.classes)
    told = f"data {data}, student {student}"
    if not run.has_classifier:
        told = f"data {data}; no loss reads the student's logits: it has no classifier, and its features are validated"
    elif student != data:
        return [Check("classes", "fail", told, f"Leave num_classes out of student.kwargs, or set it to {data}")]
    return [_teachers_classes(run, of, told) for of in run.taught_by] or [Check("classes", "ok", told)]


def _teachers_classes(run: Run, of: Taught, told: str) -> Check:
    count = of.teacher.view.shapes.classes
    embedding = gives_embeddings(of.spec, count, len(run.classes))
    if embedding or count != len(run.classes):  # methods that compare logits have refused it when they were built
        label = of.label if of.place != "teacher" else "the teacher"
        others = f"{label}'s {count} classes are others" if count else f"{label} has no classifier"
        if embedding:
            others = f"{label}'s {count} outputs are an embedding, not classes"
        return Check("classes", "ok", f"{told}; {others}, only its features are used")
    return class_names(run, of, f"{told}, {of.label} {count}")


def _unlabelled(run: Run) -> list[Check]:
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


def _inputs(run: Run) -> list[Check]:
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


def _one_step(run: Training) -> list[Check]:
    """Two forward and backward passes on real batches; batch-norm statistics are put back, nothing is updated."""
    d, config = run.model, run.config
    before = {name: b.clone() for name, b in d.named_buffers()}
    sampler = run.train_sampler(steps=min(2, run.total_steps))
    d.train()
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    losses: dict[str, torch.Tensor] = {}
    data_s = step_s = 0.0
    batches = run.train_batches(sampler, workers=0)
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        data_s = time.perf_counter() - began if batch else data_s
        if batch is None:
            break
        seed_everything(config.seed, "pre-flight")
        began = time.perf_counter()
        losses = _forward_backward(run, batch)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        step_s = time.perf_counter() - began
    dead = dead_parameters(d)
    d.zero_grad()
    with torch.no_grad():
        for name, b in d.named_buffers():
            b.copy_(before[name])
    values = {name: value.item() for name, value in losses.items()}
    return [_gradients(values, dead), _memory(run), _time(run, data_s, step_s)]


def _bad_images(run: Training) -> list[Check]:
    found = {k: v for images in (run.train_images, run.val_images) if images.bad for k, v in images.bad.found.items()}
    if not found:
        return []
    name, reason = next(iter(found.items()))
    told = f"{len(found)} of those looked at cannot be read, such as {name}: {reason}"
    return [Check("images", "warn", told, "They are left out, as data.on_bad_image says")]


def _forward_backward(run: Training, batch: Any) -> dict[str, torch.Tensor]:
    precision = run.config.train.precision
    with failures_told():
        with torch.autocast(run.device.type, AUTOCAST[precision], enabled=precision != "float32"):
            losses = run.losses(run.model, batch, 0)
        losses["total"].backward()
    return {name: value.detach() for name, value in losses.items()}


def _gradients(values: dict[str, float], dead: list[str]) -> Check:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        return Check(
            "one step",
            "fail",
            f"not finite: {', '.join(bad)}",
            "Use train.precision=float32, or look at the images and the teacher's weights",
        )
    if dead:
        return Check(
            "one step",
            "fail",
            f"{len(dead)} trainable parameters get no gradient: {', '.join(dead[:3])}",
            "Freeze them (requires_grad=False) or use them",
        )
    told = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
    return Check("one step", "ok", f"all parameters get gradients; {told}")


def _memory(run: Training) -> Check:
    if run.device.type == "cuda":
        peak, total = (
            torch.cuda.max_memory_allocated(run.device) / 2**30,
            torch.cuda.get_device_properties(run.device).total_memory / 2**30,
        )
        return Check(
            "memory",
            "ok" if peak < 0.9 * total else "warn",
            f"{peak:.1f} GiB at the peak of a step without optimiser state, of {total:.0f} GiB",
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return Check("memory", "ok", f"{peak:.1f} GiB at the peak of this process")


def _time(run: Training, data_s: float, step_s: float) -> Check:
    workers, parts = run.config.data.workers, run.config.train.accumulate
    step = parts * (max(step_s, data_s / workers) if workers else step_s + data_s)
    return Check(
        "time",
        "ok",
        f"about {duration(step * run.total_steps)} for {counted(run.epochs(run.total_steps), 'epoch')} of "
        f"{counted(run.steps_per_epoch, 'step')}, {step:.2f} s a step, without validation",
    )
