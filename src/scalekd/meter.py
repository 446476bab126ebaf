"""What is told of training between validations: mean losses, speed, where the time goes."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import parallel
from .clock import Stopwatch
from .config import Train
from .errors import UserError
from .runlog import RunLog


class Meter:
    """Adds up losses on the device and reads them every `log_every` steps; tells speed and where the time goes."""

    def __init__(
        self,
        config: Train,
        log: RunLog,
        optimizer: Optimizer,
        teacher: Stopwatch,
        *,
        steps_per_epoch: int,
        step: int,
        elapsed: float,
    ):
        self.config, self.log, self.optimizer, self.teacher, self.data = config, log, optimizer, teacher, Stopwatch()
        self.steps_per_epoch, self.total_steps = steps_per_epoch, steps_per_epoch * config.epochs
        self.sums: dict[str, Tensor] = {}
        self.first, self.before = step, elapsed
        self.began = self.window = time.perf_counter()
        teacher.seconds()

    def elapsed(self) -> float:
        return self.before + time.perf_counter() - self.began

    def add(self, step: int, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value
        if (step - self.first) >= self.config.log_every:
            self.flush(step)

    def resume(self) -> None:
        """Leaves validation out of the speed."""
        self.window = time.perf_counter()

    def flush(self, step: int) -> None:
        if step == self.first:
            return
        steps = step - self.first
        sums = parallel.sum_over_processes(torch.stack(list(self.sums.values()))).tolist()  # waits, here only
        means = {name: value / (steps * parallel.world()) for name, value in zip(self.sums, sums)}
        now = time.perf_counter()
        seconds = now - self.window
        refuse_non_finite(means, f"between steps {self.first + 1} and {step}")
        self.log.step(
            step=step,
            steps=self.total_steps,
            epoch=step / self.steps_per_epoch,
            losses=means,
            lr=self.optimizer.param_groups[0]["lr"],
            images_per_s=steps * self.config.batch_size / seconds,
            data_share=self.data.seconds() / seconds,
            teacher_share=self.teacher.seconds() / seconds,
            left_s=seconds / steps * (self.total_steps - step),
        )
        self.sums, self.first, self.window = {}, step, now


def refuse_non_finite(losses: dict[str, float], when: str) -> None:
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        terms = [name for name in bad if name != "total"] or bad
        raise UserError(
            f"the loss is not finite: {', '.join(terms)} {when}. The last checkpoint is from before. "
            "Lower optim.lr, set train.clip_grad=1.0, or use train.precision=bf16 in place of fp16."
        )
