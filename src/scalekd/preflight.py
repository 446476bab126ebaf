"""What is checked before step 1: a screen that a person reads in ten seconds."""

from __future__ import annotations

import math
import resource
import time
from typing import Literal, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import parallel
from .build import Run
from .config import height_and_width
from .data import Batch, Images, eval_batches, eval_transform, seed_everything, train_batches
from .distiller import dead_parameters, interpolation
from .engine import AUTOCAST, on_device
from .errors import UserError, counted, printable
from .evaluate import evaluate
from .health import train_sampler
from .runlog import duration

SAMPLE = 512  # validation images for the teacher's accuracy
TIGHT = 10.0  # points: an accuracy known this well and at chance is chance


class Check(NamedTuple):
    name: str
    status: Literal["ok", "warn", "fail"]
    text: str
    fix: str = ""


def preflight(run: Run, console: Console) -> None:
    """Prints every check; raises `UserError` with the fixes when one fails. Leaves the run as it found it."""
    checks = [*_weights(run), _classes(run), *_inputs(run)]
    if run.distiller.teacher_view is not None and not any(c.status == "fail" for c in checks):
        checks += _teacher_accuracy(run)
    if not any(c.status == "fail" for c in checks):
        checks += [*_one_step(run), *_bad_images(run)]
    if parallel.rank() == 0:
        _print(run, checks, console)
    failed = [c for c in checks if c.status == "fail"]
    if failed:
        raise UserError("pre-flight: " + "\n".join(f"{c.name}: {c.text}. {c.fix}" for c in failed))


def _print(run: Run, checks: list[Check], console: Console) -> None:
    teacher = f" <- {run.distiller.teacher_view.name}" if run.distiller.teacher_view else ""
    losses = ", ".join(run.config.losses)
    console.print(f"Pre-flight: {run.distiller.student_view.name}{teacher}  ({losses})", highlight=False, markup=False)
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(box=None, show_header=False, padding=(0, 1))
    for c in checks:
        text = c.text + (f". {c.fix}" if c.status == "warn" and c.fix else "")
        # Text: a class may be called [red]
        table.add_row(Text(c.status, colours[c.status]), c.name, Text(printable(text)))
    console.print(table, highlight=False)


def _weights(run: Run) -> list[Check]:
    checks = []
    for role in ("teacher", "student"):
        if role not in run.loaded:
            continue
        loaded, spec = run.loaded[role], getattr(run.config, role)
        name = f"{role} weights"
        if loaded.source != "random":
            told = f"{loaded.matched} of {loaded.total} tensors from {loaded.source}"
            told += f" (sha256 {loaded.sha256[:12]})" if loaded.sha256 else ""
            told += f"; {loaded.head}" if loaded.head else ""
            if loaded.untrained:
                checks.append(
                    Check(
                        name,
                        "fail",
                        f"{told}, but {loaded.initial:.0%} of the biases and norms are at their initial values",
                        f"These weights were never trained; give others, or {role}.weights=random if you mean it",
                    )
                )
            else:
                checks.append(
                    Check(name, "ok", f"{told}; {loaded.initial:.0%} of the biases and norms at initial values")
                )
        elif role == "student":
            checks.append(Check(name, "ok", "initial values, from seed " + str(run.config.seed)))
        elif spec.weights == "random":
            checks.append(Check(name, "warn", "random, as the recipe asks: it knows nothing"))
        else:
            checks.append(
                Check(
                    name,
                    "fail",
                    "none are named",
                    "Set teacher.weights=pretrained, or to a file; teacher.weights=random if you mean it",
                )
            )
    return checks


def _classes(run: Run) -> Check:
    student, data = run.distiller.student_view.shapes.classes, len(run.classes)
    told = f"data {data}, student {student}"
    if student != data:
        return Check("classes", "fail", told, f"Leave num_classes out of student.kwargs, or set it to {data}")
    if run.distiller.teacher_view is None:
        return Check("classes", "ok", told)
    teacher = run.distiller.teacher_view.shapes.classes
    if teacher != data:  # methods that compare logits have refused it when they were built
        return Check(
            "classes",
            "ok",
            f"{told}; the teacher's {teacher or 'missing'} classes are others, only its features are used",
        )
    return Check("classes", "ok", f"{told}, teacher {teacher}")


def _inputs(run: Run) -> list[Check]:
    d = run.distiller
    height, width = height_and_width(run.config.data.image_size)
    checks = [Check("student input", "ok", f"{height}x{width}, {_stats(d.student_mean, d.student_std)}")]
    if d.teacher_view is not None:
        other = ", from the same augmented pixels" if d.teacher_size != d.image_size else ""
        checks.append(
            Check(
                "teacher input",
                "ok",
                f"{d.teacher_size[0]}x{d.teacher_size[1]}{other}, {_stats(d.teacher_mean, d.teacher_std)}",
            )
        )
    return checks


def _stats(mean: torch.Tensor, std: torch.Tensor) -> str:
    mean_text, std_text = (" ".join(f"{v:.3f}" for v in t.flatten().tolist()) for t in (mean, std))
    return f"mean {mean_text}, std {std_text}"


def _teacher_accuracy(run: Run) -> list[Check]:
    d = run.distiller
    assert d.teacher_view is not None and run.config.teacher is not None
    classes = len(run.classes)
    if d.teacher_view.shapes.classes != classes:
        return []
    val = run.val_images
    stride = max(1, len(val) // SAMPLE)
    data = run.config.data.model_copy(update={"image_size": d.teacher_size})
    augment = run.config.augment.model_copy(update={"interpolation": interpolation(d.teacher_view.model)})
    sample = Images(val.source, list(val.indices)[::stride][:SAMPLE], eval_transform(data, augment), None, val.bad)
    result = evaluate(
        d.teacher_view.model,
        eval_batches(sample, 64, 0, False),
        d.teacher_mean,
        d.teacher_std,
        run.device,
    )
    top1, n = result["top1"], int(result["images"])
    known, chance = run.config.teacher.top1, 100 / classes
    told = f"{top1:.1f} % on {n} validation images" + (f" (known: {known:.1f} %)" if known else "")
    slack = 3 * math.sqrt(max(top1, 1) * max(100 - top1, 1) / n)  # three standard errors, in points
    at_chance = top1 <= chance + slack and classes > 1
    doubt = ""
    if at_chance and slack <= TIGHT:
        doubt = f"That is chance level ({chance:.1f} %): wrong weights, or classes in another order?"
    elif known and top1 < known - slack:
        doubt = "Far below its known figure: other mean/std, size or class order?"
    elif at_chance:
        doubt = f"That cannot be told from chance ({chance:.1f} %) on {n} images; if it should be far above, look at weights and class order"
    return [Check("teacher accuracy", "warn" if doubt else "ok", told, doubt)]


def _one_step(run: Run) -> list[Check]:
    """Two forward and backward passes on real batches; batch-norm statistics are put back, nothing is updated."""
    d, config = run.distiller, run.config
    before = {name: b.clone() for name, b in d.named_buffers()}
    sampler = train_sampler(run, steps=min(2, run.total_steps))
    d.train()
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    losses: dict[str, torch.Tensor] = {}
    data_s = step_s = 0.0
    batches = train_batches(run.train_images, sampler, workers=0, pin=False)
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


def _bad_images(run: Run) -> list[Check]:
    found = {k: v for images in (run.train_images, run.val_images) if images.bad for k, v in images.bad.found.items()}
    if not found:
        return []
    name, reason = next(iter(found.items()))
    told = f"{len(found)} of those looked at cannot be read, such as {name}: {reason}"
    return [Check("images", "warn", told, "They are left out, as data.on_bad_image says")]


def _forward_backward(run: Run, batch: Batch) -> dict[str, torch.Tensor]:
    precision = run.config.train.precision
    with torch.autocast(run.device.type, AUTOCAST[precision], enabled=precision != "float32"):
        losses = run.distiller(*on_device(batch, run))
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


def _memory(run: Run) -> Check:
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


def _time(run: Run, data_s: float, step_s: float) -> Check:
    workers, parts = run.config.data.workers, run.config.train.accumulate
    step = parts * (max(step_s, data_s / workers) if workers else step_s + data_s)
    return Check(
        "time",
        "ok",
        f"about {duration(step * run.total_steps)} for {counted(run.config.train.epochs, 'epoch')} of "
        f"{counted(run.steps_per_epoch, 'step')}, {step:.2f} s a step, without validation",
    )
