"""Two real training steps before training: gradients, memory and time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from scalekd.common.errors import UserError

if TYPE_CHECKING:
    pass
import math
import resource
import time

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scalekd.common import parallel
from scalekd.common.seeds import seed_everything
from scalekd.common.text import counted, duration, printable
from scalekd.train.compile import explain_compile_failure
from scalekd.train.run import AUTOCAST, Run

from .loader import workers_check
from .model import Check


def dead_parameters(model: nn.Module) -> list[str]:
    """After a backward pass: names of trainable parameters that received no gradient."""
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def finish(run: Run, title: str, checks: list[Check], console: Console) -> None:
    """Adds a step to the checks unless one failed already, prints all; raises `UserError` with the fixes if one fails."""
    if not any(c.status == "fail" for c in checks):
        checks = [*checks, *one_step(run), *_bad_images(run)]
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


def one_step(run: Run) -> list[Check]:
    """Two forward and backward passes on real batches; batch-norm statistics are put back, nothing is updated."""
    d, config = run.model, run.config
    before = {name: b.clone() for name, b in d.named_buffers()}
    sampler = run.train_sampler(steps=min(2, run.total_steps))
    d.train()
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    losses: dict[str, torch.Tensor] = {}
    data_s = step_s = 0.0
    batches, last = run.train_batches(sampler, workers=0), None
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        data_s = time.perf_counter() - began if batch else data_s
        if batch is None:
            break
        last = batch
        seed_everything(config.seed, "pre-flight")
        began = time.perf_counter()
        losses = forward_backward(run, batch)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        step_s = time.perf_counter() - began
    dead = dead_parameters(d)
    d.zero_grad()
    with torch.no_grad():
        for name, b in d.named_buffers():
            b.copy_(before[name])
    values = {name: value.item() for name, value in losses.items()}
    return [_gradients(values, dead), _memory(run), _time(run, data_s, step_s), *workers_check(run, last)]


def _bad_images(run: Run) -> list[Check]:
    found = {k: v for images in (run.train_images, run.val_images) if images.bad for k, v in images.bad.found.items()}
    if not found:
        return []
    name, reason = next(iter(found.items()))
    told = f"{len(found)} of those looked at cannot be read, such as {name}: {reason}"
    return [Check("images", "warn", told, "They are left out, as data.on_bad_image says")]


def forward_backward(run: Run, batch: Any) -> dict[str, torch.Tensor]:
    precision = run.config.train.precision
    with explain_compile_failure():
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
        f"about {duration(step * run.total_steps)} for {counted(run.epochs(run.total_steps), 'epoch')} of "
        f"{counted(run.steps_per_epoch, 'step')}, {step:.2f} s a step, without validation",
    )
