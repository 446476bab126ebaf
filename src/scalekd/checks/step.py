"""Two trial training steps on real batches, checking gradients, memory and time; and the printed screen."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.common.seeds import seed_everything
from scalekd.common.text import counted, duration, printable
from scalekd.train.compile import explain_compile_failure
from scalekd.train.hardware import precision_for
from scalekd.train.run import AUTOCAST, Run

from .loader import workers_check
from .model import Check

NAMES = 16  # width of the column of names
TRIAL = 101  # the step that the trial stands for: a usual one, in which `balance` measures nothing


def dead_parameters(model: nn.Module) -> list[str]:
    """Names of trainable parameters that received no gradient. Call it after a backward pass."""
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


class Screen:
    """The pre-flight screen. Each line is printed as soon as it is known, and long work is announced."""

    def __init__(self, title: str, console: Console):
        self.console, self.active = console, parallel.rank() == 0
        self.failed: list[Check] = []
        if self.active:
            console.print(f"Pre-flight: {title}", highlight=False, markup=False)

    def doing(self, text: str) -> None:
        """Announces work that takes more than a moment."""
        if self.active:
            self.console.print(Text(f"  ... {printable(text)}", "dim"), highlight=False)

    def show(self, checks: Iterable[Check]) -> None:
        """Prints the lines, in the order in which they come."""
        for c in checks:
            if c.status == "fail":
                self.failed.append(c)
            if self.active:
                self.console.print(_line(c), highlight=False)

    def finish(self, run: Run) -> None:
        """Runs the trial steps unless a check failed already. Raises `UserError` with the fixes if a check failed."""
        self.show([device_check(run)])
        if not self.failed:
            self.doing("two trial steps on real batches")
            self.show(one_step(run))
            self.show(_bad_images(run))
        if self.failed:
            raise UserError("pre-flight: " + "\n".join(f"{c.name}: {c.text}. {c.fix}" for c in self.failed))


def _line(c: Check) -> Table:
    """A line with its text in columns, wrapped to the width of the screen."""
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    text = c.text + (f". {c.fix}" if c.status == "warn" and c.fix else "")
    line = Table(box=None, show_header=False, padding=(0, 1))
    line.add_column(width=4)
    line.add_column(min_width=NAMES)
    line.add_column()
    # Text, because rich reads a class name such as [red] as markup
    line.add_row(Text(c.status, colours[c.status]), Text(c.name), Text(printable(text)))
    return line


def device_check(run: Run) -> Check:
    """Where the run computes, and how: precision, memory format and data workers, with `auto` resolved."""
    train, device = run.config.train, run.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    text = f"{name}, {train.precision}{', channels last' * train.channels_last}"
    text += f", {counted(run.config.data.workers, 'data worker')}"
    if train.precision == "bf16" and precision_for(device) != "bf16":
        slow = "it has no bf16 instructions, so steps take up to twice as long as in float32"
        return Check("device", "warn", f"{text}; {slow}", "Set train.precision=auto")
    return Check("device", "ok", text)


def one_step(run: Run) -> list[Check]:
    """Runs two forward and backward passes on real batches.

    Updates no parameter and restores all buffers, such as batch-norm statistics.
    """
    d, config = run.model, run.config
    before = {name: b.clone() for name, b in d.named_buffers()}
    if (balance := getattr(d, "gradients", None)) is not None:
        balance.counts.fill_(1)  # as if all gradients were of one norm; a loss that was not measured has the factor 0
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
        d.zero_grad()  # as between steps: CUDA graphs reuse the memory of gradients
        began = time.perf_counter()
        losses = forward_backward(run, batch, TRIAL * config.train.accumulate)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        step_s = time.perf_counter() - began
    dead = dead_parameters(d)
    d.zero_grad()
    with torch.no_grad():
        for name, b in d.named_buffers():
            b.copy_(before[name])
    values = {name: value.item() for name, value in losses.items()}
    more = [*workers_check(run, last), *_average(run)]
    return [_gradients(values, dead), _memory(run), _time(run, data_s, step_s), *more]


def _bad_images(run: Run) -> list[Check]:
    bad = {k: v for images in (run.train_images, run.val_images) if images.bad for k, v in images.bad.found.items()}
    if not bad:
        return []
    name, reason = next(iter(bad.items()))
    text = f"{len(bad)} of the images read so far cannot be opened, such as {name}: {reason}"
    return [Check("images", "warn", text, "They are skipped (data.on_bad_image)")]


def forward_backward(run: Run, batch: Any, micro: int) -> dict[str, torch.Tensor]:
    """One forward and backward pass in the run's precision, of micro-batch `micro`. Returns the losses, detached."""
    precision = run.config.train.precision
    with explain_compile_failure():
        with torch.autocast(run.device.type, AUTOCAST[precision], enabled=precision != "float32"):
            losses = run.losses(run.model, batch, micro)
        losses["total"].backward()
    return {name: value.detach() for name, value in losses.items()}


def _gradients(values: dict[str, float], dead: list[str]) -> Check:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        return Check(
            "one step",
            "fail",
            f"NaN or infinite: {', '.join(bad)}",
            "Set train.precision=float32, or check the images and the teacher's weights",
        )
    if dead:
        return Check(
            "one step",
            "fail",
            f"{len(dead)} trainable parameters receive no gradient: {', '.join(dead[:3])}",
            "Use them in the forward pass, or freeze them (requires_grad=False)",
        )
    text = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
    return Check("one step", "ok", f"all trainable parameters receive gradients; losses: {text}")


def _memory(run: Run) -> Check:
    if run.device.type == "cuda":
        peak, total = (
            torch.cuda.max_memory_allocated(run.device) / 2**30,
            torch.cuda.get_device_properties(run.device).total_memory / 2**30,
        )
        return Check(
            "memory",
            "ok" if peak < 0.9 * total else "warn",
            f"peak {peak:.1f} of {total:.0f} GiB in one step, without optimiser state",
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return Check("memory", "ok", f"peak {peak:.1f} GiB in this process")


def _time(run: Run, data_s: float, step_s: float) -> Check:
    workers, parts = run.config.data.workers, run.config.train.accumulate
    step = parts * (max(step_s, data_s / workers) if workers else step_s + data_s)
    return Check(
        "time",
        "ok",
        f"about {duration(step * run.total_steps)} for {counted(run.epochs(run.total_steps), 'epoch')} of "
        f"{counted(run.steps_per_epoch, 'step')}, {step:.2f} s per step, without validation",
    )


def _average(run: Run) -> list[Check]:
    """Whether the averaged weights get the decay of the recipe within the run."""
    if not (decay := run.config.train.ema):
        return []
    reached, steps = round(1 / (1 - decay)), run.total_steps
    if reached < steps:
        return [
            Check("averaged weights", "ok", f"decay {decay:g} from step {reached} of {steps}, before it their mean")
        ]
    text = f"train.ema {decay:g} averages over {reached} steps and the run has {steps}: the average is the mean of all of them"
    return [Check("averaged weights", "warn", text, f"Use at most {max(0.5, 1 - 10 / steps):.6g}, or remove train.ema")]
