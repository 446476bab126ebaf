"""What is told of training between validations: mean losses, speed, where the time goes."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from scalekd.common import parallel
from scalekd.common.stopwatch import Stopwatch

from .health import NonFinite, non_finite
from .log import RunLog
from .resume import Progress
from .run import Run


class Meter:
    """Adds up losses on the device and reads them every `log_every` steps; tells speed and where the time goes."""

    def __init__(self, run: Run, log: RunLog, at: Progress):
        self.run, self.config, self.log, self.data = run, run.config.train, log, Stopwatch()
        # what was added up before the run was stopped goes on in the first process
        self.sums: dict[str, Tensor | float] = {n: v * (parallel.rank() == 0) for n, v in at.sums.items()}
        self.counted, self.before = at.counted, at.elapsed
        self.timed = 0  # steps in this window that this process saw
        self.first_bad: Tensor | None = None
        self.began = self.window = time.perf_counter()
        if run.teacher_clock:
            run.teacher_clock.seconds()

    def elapsed(self) -> float:
        return self.before + time.perf_counter() - self.began

    def add(self, step: int, losses: dict[str, Tensor], grad_norm: Tensor) -> None:
        if self.config.precision == "fp16":  # its gradient scaler leaves out steps with an infinite one by itself
            grad_norm = torch.where(grad_norm.isfinite(), grad_norm, 0)
        for name, value in (losses | {"gradient": grad_norm}).items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        bad = torch.where((losses["total"] + grad_norm).isfinite(), 0, step)
        self.first_bad = bad if self.first_bad is None else torch.where(self.first_bad > 0, self.first_bad, bad)
        self.counted += 1
        self.timed += 1
        if self.counted >= self.config.log_every:
            self.flush(step)

    def resume(self) -> None:
        """Leaves validation out of the speed."""
        self.window = time.perf_counter()

    def write_to(self, at: Progress) -> None:
        """So that a run that goes on from there logs the same means. All processes together."""
        at.elapsed, at.counted = self.elapsed(), self.counted
        at.sums = dict(zip(self.sums, self._totals()))

    def _totals(self) -> list[float]:
        if not self.sums:
            return []
        return parallel.sum_over_processes(torch.stack([torch.as_tensor(v) for v in self.sums.values()])).tolist()

    def flush(self, step: int) -> None:
        if not self.counted:
            return
        means = {name: value / (self.counted * parallel.world()) for name, value in zip(self.sums, self._totals())}
        now = time.perf_counter()  # the losses were waited for: this is when the steps were done
        seconds, timed = now - self.window, max(1, self.timed)  # none if all that was counted is from before a stop
        if terms := non_finite(means):
            assert self.first_bad is not None
            first = [s for s in parallel.gather(int(self.first_bad)) if s]
            raise NonFinite(min(first, default=step), terms, before_update=False)
        grad_norm, total, teacher = means.pop("gradient"), self.run.total_steps, self.run.teacher_clock
        self.log.step(
            step=step,
            steps=total,
            epoch=step / self.run.steps_per_epoch,
            losses=means,
            grad_norm=grad_norm,
            lr=self.run.optimizer.param_groups[0]["lr"],
            images_per_s=timed * self.config.batch_size / seconds,
            data_share=self.data.seconds() / seconds,
            **({"teacher_share": teacher.seconds() / seconds} if teacher else {}),
            left_s=seconds / timed * (total - step),
        )
        self.sums, self.counted, self.timed, self.first_bad, self.window = {}, 0, 0, None, now
