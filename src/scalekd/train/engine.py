"""The training loop of every task: `train` is a whole run, `train_step` is one optimiser step.

What differs between tasks (losses, batches, validation) is behind the methods of `run.Run`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.common.seeds import seed_everything
from scalekd.common.stop import Stopped, StopRequest, current
from scalekd.common.text import counted
from scalekd.data.images import read_list

from . import checkpoint, health, resume
from .compile import explain_compile_failure
from .health import NonFinite
from .log import RunLog
from .meter import Meter
from .next_batches import Agreed, agree, fetch
from .resume import Progress
from .run import AUTOCAST, KEPT, Run

# ---------------------------------------------------------------- one step


class Step(NamedTuple):
    losses: dict[str, Tensor]  # scalar per term: the mean over this process's micro-batches, on the device
    grad_norm: Tensor  # scalar: L2 norm of all gradients together, before clipping


def train_step(model: nn.Module, batches: Sequence[Any], run: Run, step: int, checked: bool = False) -> Step:
    """One optimiser step: forward and backward over the micro-batches, clip, update, average.

    Args:
        model: `run.model`, or its DDP wrapper.
        batches: this process's micro-batches.
        step: the number of steps before this one.
        checked: check losses and gradients before the update, which waits for the device.

    Raises:
        NonFinite: if `checked` finds one; weights, optimiser and buffers are then as before the step.
    """
    train = run.config.train
    # the forward pass changes the running statistics of batch norms; keep them in case the step is rejected
    buffers = [b.clone() for b in run.model.buffers()] if checked else []
    losses = _forward_backward(model, batches, run, step)
    # fp16 gradients are scaled; their norm and the clipping need the true values
    run.scaler.unscale_(run.optimizer)
    grad_norm = get_total_norm([p.grad for p in run.model.parameters() if p.grad is not None])
    if checked:
        try:
            health.check_step(step + 1, losses, grad_norm, run.scaler.is_enabled())
        except NonFinite:
            run.optimizer.zero_grad()
            with torch.no_grad():
                for buffer, before in zip(run.model.buffers(), buffers):
                    buffer.copy_(before)
            raise
    if train.clip_grad:
        clip_grads_with_norm_(run.model.parameters(), train.clip_grad, grad_norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    if run.ema:
        run.ema.update(run.student, step=step)
    return Step(losses, grad_norm)


def _forward_backward(model: nn.Module, batches: Sequence[Any], run: Run, step: int) -> dict[str, Tensor]:
    """Adds up the gradients of all micro-batches; returns the mean of each loss term."""
    precision = run.config.train.precision
    losses: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        # mixup and drop path draw from the global generators: seeding by position makes a resumed step the same
        seed_everything(run.config.seed, step, i * parallel.world() + parallel.rank())
        # DDP averages the gradients of the processes in backward; once per step is enough
        last = i == len(batches) - 1
        sync = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()
        with sync, explain_compile_failure():
            with torch.autocast(run.device.type, AUTOCAST[precision], enabled=precision != "float32"):
                terms = run.losses(model, batch, step * len(batches) + i)
            # divided, so that the sum of the gradients is their mean over the micro-batches
            run.scaler.scale(terms["total"] / len(batches)).backward()
        for name, value in terms.items():
            losses[name] = losses.get(name, 0) + value.detach() / len(batches)
    return losses


# ---------------------------------------------------------------- a whole run


def train(run: Run, folder: Path, log: RunLog, stop: StopRequest | None = None) -> dict[str, Any]:
    """Trains to the end, from the newest checkpoint in `folder` if there is one. Returns and logs the summary.

    Writes last.pt every `train.save_minutes` and at every validation, and best.pt when the metric `run.chooser` improves.
    Ends early if it has not improved for `train.patience` validations.

    Raises:
        Stopped: if `stop` was requested; the checkpoint is written.
        UserError: if a loss or gradient is not finite, or data cannot be read; the last step is saved.
    """
    stop = stop or current()
    checked = looks_at_every_step(run)
    for images in (run.train_images, run.val_images):
        if images.bad is not None:
            images.bad.keep_in(folder, images.still_bad)
    while True:
        progress = resume.restore(run, folder, log)
        if not progress.step:
            run.prepare()
        stop.saved, stop.wait_for_step = progress.step, True
        try:
            _train_from(run, progress, folder, log, stop, checked)
            break
        except NonFinite as error:
            if error.before_update:
                raise health.report(run, progress, error, folder) from None
            # noticed at a log line, after the update: repeat from the last checkpoint to find the first bad step
            checked = True
            log.say(f"{error}; returning to the last checkpoint, and checking every step from there")
    summary = _summary(run, progress, folder)
    if summary["bad_images"]:
        log.say(f"{counted(summary['bad_images'], 'unreadable image')} skipped; see {folder}/bad-images.txt")
    log.event("finished", **summary)
    return summary


def _summary(run: Run, progress: Progress, folder: Path) -> dict[str, Any]:
    last = progress.history[-1]
    summary = {
        **{key: last[key] for key in run.figures},
        f"best_{run.chooser}": progress.best,
        "best_by": run.chooser,
        "figure": run.figures[run.chooser],
        "epochs": last["epoch"],
        "seconds": round(progress.elapsed, 1),
        "seed": run.config.seed,
        "steps": progress.step,
        "bad_images": len(read_list(folder)),
    }
    if ended := ended_early(run, progress):
        summary["ended_early"] = ended
    return summary | {key: last[key] for key in KEPT if key in last}


def ended_early(run: Run, progress: Progress) -> str:
    """Why the run ends at its last validation, before its last step; '' if it does not.

    It follows from the validations that a checkpoint holds, so a resumed run ends where the other one does.
    """
    patience, done = run.config.train.patience, progress.history
    if patience is None or not done or done[-1]["step"] < progress.step or progress.step == run.total_steps:
        return ""
    values = [validation[run.chooser] for validation in done]
    since = len(values) - 1 - values.index(max(values))  # the first of equal ones is in best.pt
    if since < patience:
        return ""
    return (
        f"no better {run.figures[run.chooser]} in {counted(since, 'validation')} since step {done[-1 - since]['step']}; "
        f"the run had {run.total_steps} steps"
    )


def looks_at_every_step(run: Run) -> bool:
    """Whether each step is checked before its update. On a CPU this is free; a GPU has to be waited for."""
    return run.device.type == "cpu" or run.config.train.skip_nonfinite > 0


def _train_from(run: Run, progress: Progress, folder: Path, log: RunLog, stop: StopRequest, checked: bool) -> None:
    """Trains from `progress` to the end of the run; updates `progress`."""
    config, model = run.config, run.model
    if parallel.world() > 1:
        model = DistributedDataParallel(model, device_ids=[run.device.index] if run.device.type == "cuda" else None)
    log.start(progress.step, run.total_steps)
    meter = Meter(run, log, progress)
    saver = _Saver(run, progress, folder, meter, stop)
    if not checked and not progress.step:
        saver.save()  # the checkpoint to return to if a step turns out not to be finite
    model.train()
    sampler = run.train_sampler(progress.step)
    # close the data workers as soon as the run stops: they ignore the signals that stop this process
    with contextlib.closing(run.train_batches(sampler, config.data.workers)) as batches:
        while True:
            if _validation_is_due(run, progress):
                meter.flush(progress.step)
                validate(run, progress, folder, log, meter, saver)
                saver.save()
                parallel.wait_for_all()
                meter.resume()
            if progress.step == run.total_steps:
                break
            if ended := ended_early(run, progress):
                log.event("ended_early", step=progress.step, reason=ended)
                log.say(f"{log.label} ends after step {progress.step} (train.patience): {ended}")
                break
            with meter.data.timing(torch.device("cpu")):
                fetched = fetch(batches, config.train.accumulate, stop)
            # agreed between the processes, so that all of them stop and save after the same step
            overdue = saver.age() >= 60 * config.train.save_minutes
            _save_and_raise(agree(stop, fetched.failure, run.train_images.bad, overdue), saver)
            run.schedule.step_update(progress.step)
            try:
                done = train_step(model, fetched.batches, run, progress.step, checked)
            except NonFinite as error:
                if progress.skipped == config.train.skip_nonfinite:
                    raise
                progress.skipped += 1
                progress.step += 1
                log.event("skipped", step=progress.step, terms=error.terms)
                log.say(f"{log.label} {error}: skipped, {progress.skipped} of at most {config.train.skip_nonfinite}")
            else:
                progress.step += 1
                meter.add(progress.step, done.losses, done.grad_norm)
    meter.write_to(progress)


class _Saver:
    """Writes the checkpoints of a run, and never the same state twice."""

    def __init__(self, run: Run, progress: Progress, folder: Path, meter: Meter, stop: StopRequest):
        self.run, self.progress, self.folder, self.meter, self.stop = run, progress, folder, meter, stop
        self.saved = (progress.step, len(progress.history)) if progress.step else None
        self.when = time.monotonic()

    def save(self) -> None:
        state = (self.progress.step, len(self.progress.history))
        if state != self.saved:
            self.meter.write_to(self.progress)
            resume.save(self.run, self.progress, self.folder)
            self.saved, self.stop.saved = state, self.progress.step
        self.when = time.monotonic()

    def age(self) -> float:
        """Seconds since the last save, or since the start."""
        return time.monotonic() - self.when


# ---------------------------------------------------------------- validation


def _validation_is_due(run: Run, progress: Progress) -> bool:
    validated = progress.history[-1]["step"] if progress.history else 0
    boundary = progress.step % run.eval_steps == 0 or progress.step == run.total_steps
    return boundary and progress.step > validated


def validate(run: Run, progress: Progress, folder: Path, log: RunLog, meter: Meter, saver: _Saver) -> None:
    """Appends a validation to `progress.history`, and writes best.pt if it is the best so far.

    Saves before it raises `Stopped` or an error of the data.
    """
    parallel.copy_buffers_of_first(run.deployed)
    health.expect_finite(run.deployed, progress.step)
    size, images = run.eval_batch_size, len(run.val_images)
    rounds = math.ceil(math.ceil(images / size) / parallel.world())
    with contextlib.closing(run.eval_batches(size, run.config.data.workers)) as batches:
        result = run.validate(_until_stopped(batches, rounds, run, saver))
    result = parallel.from_first(result)  # so that all processes agree on the best and on the end
    if not math.isfinite(result.get("loss", 0.0)):
        raise UserError(
            f"the validation loss is not finite after step {progress.step}. "
            f"The last checkpoint was saved before that.\n{health.ADVICE}"
        )
    progress.history.append({"epoch": run.epochs(progress.step), "step": progress.step} | result)
    chooser = run.chooser
    improved, progress.best = result[chooser] > progress.best, max(progress.best, result[chooser])
    log.validation(
        run.figures,
        epochs=run.epochs(run.total_steps),
        steps=run.total_steps,
        best=progress.best,
        best_by=chooser,
        elapsed_s=meter.elapsed(),
        skipped=progress.skipped,
        **progress.history[-1],
    )
    # before last.pt: a run that is killed between the two resumes from an earlier step and writes both again
    if improved and parallel.rank() == 0:
        best = {"student": run.deployed.state_dict(), "step": progress.step, "best_by": chooser}
        best |= {key: result[key] for key in (*KEPT, *run.figures) if key in result}
        checkpoint.save(folder / "best.pt", best)


def _until_stopped(batches: Iterator[Any], rounds: int, run: Run, saver: _Saver) -> Iterator[Any]:
    """Yields the batches. In every round all processes agree on whether to stop, also those without a batch left."""
    for _ in range(rounds):
        fetched = fetch(batches, 1, saver.stop)
        _save_and_raise(agree(saver.stop, fetched.failure, run.val_images.bad), saver)
        yield from fetched.batches
    yield from batches  # a task may split what the sampler asks for into several batches
    _save_and_raise(agree(saver.stop, None, run.val_images.bad), saver)


def _save_and_raise(agreed: Agreed, saver: _Saver) -> None:
    """Ends the run in all processes, saved, if one of them has a signal or a failure."""
    if agreed.signal or agreed.failure or agreed.due:
        saver.save()
    if agreed.failure:
        raise agreed.failure
    if agreed.signal:
        raise Stopped(agreed.signal, saver.progress.step)
