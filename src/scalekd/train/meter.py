"""Measures training between log lines: mean losses, images per second, and the share of time in data and teacher."""

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
    """Sums the losses on the device, and every `train.log_every` steps reads and logs their means.

    Reading them is the only time that training waits for a GPU.
    """

    def __init__(self, run: Run, log: RunLog, progress: Progress):
        self.run, self.config, self.log, self.data = run, run.config.train, log, Stopwatch()
        # the checkpoint's sums are of all processes; the first one continues them
        self.sums: dict[str, Tensor | float] = {n: v * (parallel.rank() == 0) for n, v in progress.sums.items()}
        self.counted, self.before = progress.counted, progress.elapsed
        self.timed = 0  # the steps since the last log line that this process itself did
        self.first_bad: Tensor | None = None  # the first step with a value that is not finite; 0: none
        self.began = self.window = time.perf_counter()
        if run.teacher_clock:
            run.teacher_clock.seconds()  # discard what was measured before training

    def elapsed(self) -> float:
        """Seconds of training, including those before a resume."""
        return self.before + time.perf_counter() - self.began

    def add(self, step: int, losses: dict[str, Tensor], grad_norm: Tensor) -> None:
        """Adds a step, and logs if `log_every` steps are reached. Raises `NonFinite`, as `flush` does."""
        if self.config.precision == "fp16":  # the gradient scaler skips steps whose gradient overflows
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
        """Restarts the clock after a validation, which does not count as training time."""
        self.window = time.perf_counter()

    def write_to(self, progress: Progress) -> None:
        """Stores the sums, so that a resumed run logs the same means. All processes must call it."""
        progress.elapsed, progress.counted = self.elapsed(), self.counted
        progress.sums = dict(zip(self.sums, self._totals()))

    def _totals(self) -> list[float]:
        if not self.sums:
            return []
        return parallel.sum_over_processes(torch.stack([torch.as_tensor(v) for v in self.sums.values()])).tolist()

    def flush(self, step: int) -> None:
        """Logs the means since the last log line, if there are any. Raises `NonFinite` if one is not finite."""
        if not self.counted:
            return
        means = {name: value / (self.counted * parallel.world()) for name, value in zip(self.sums, self._totals())}
        now = time.perf_counter()  # after `_totals`, which waits until the device has finished the steps
        # `timed` is 0 if all counted steps were done before a resume
        seconds, timed = now - self.window, max(1, self.timed)
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
            **({"gradient_shares": shares} if (shares := self.run.gradient_shares()) else {}),
            left_s=seconds / timed * (total - step),
        )
        self.sums, self.counted, self.timed, self.first_bad, self.window = {}, 0, 0, None, now
