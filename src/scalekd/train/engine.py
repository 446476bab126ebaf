"""Run, of any task: `train` runs what was built, `train_step` is one optimiser step."""

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
from scalekd.common.stop import Stopped, StopRequest
from scalekd.data.images import read_list

from . import checkpoint, health, resume
from .compile import explain_compile_failure
from .health import NonFinite
from .log import RunLog
from .meter import Meter
from .resume import Progress
from .run import AUTOCAST, Run

# ---------------------------------------------------------------- one step


class Step(NamedTuple):
    losses: dict[str, Tensor]  # mean of each term over the micro-batches, on the device
    grad_norm: Tensor  # of all gradients together, before clipping


def train_step(model: nn.Module, batches: Sequence[Any], run: Run, step: int, checked: bool = False) -> Step:
    """One optimiser step over the micro-batches.

    model: `run.model`, or its DDP wrapper. step: how many came before.
    checked: wait for the losses and the gradient before the update; raises `NonFinite`, with everything as it was.
    """
    train = run.config.train
    buffers = [b.clone() for b in run.model.buffers()] if checked else []
    losses: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        # randomness of mixup and drop path follows from the place in the global batch, as the samples' does
        seed_everything(run.config.seed, step, i * parallel.world() + parallel.rank())
        last = i == len(batches) - 1
        # the processes' gradients are averaged once, with the last micro-batch
        alone = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()
        with alone, explain_compile_failure():
            with torch.autocast(run.device.type, AUTOCAST[train.precision], enabled=train.precision != "float32"):
                of_batch = run.losses(model, batch, step * len(batches) + i)
            run.scaler.scale(of_batch["total"] / len(batches)).backward()
        for name, value in of_batch.items():
            losses[name] = losses.get(name, 0) + value.detach() / len(batches)
    run.scaler.unscale_(run.optimizer)
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    grad_norm = get_total_norm(gradients)
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


# ---------------------------------------------------------------- a whole run


def train(run: Run, folder: Path, log: RunLog, stop: StopRequest | None = None) -> dict[str, Any]:
    """Trains to the end, from the newest checkpoint in `folder` if there is one. Returns the summary that it also logs.

    Writes last.pt every `train.save_minutes` and at every validation, best.pt when the first of `run.figures` is the best so far.
    Raises `Stopped`, saved, when `stop` asks for it, and `UserError` when a loss or gradient is not finite.
    """
    stop = stop or StopRequest()
    checked = looks_at_every_step(run)
    stop.wait_for_step = True
    for images in (run.train_images, run.val_images):
        if images.bad is not None:
            images.bad.keep_in(folder)
    while True:
        at = resume.restore(run, folder, log)
        try:
            _train_from(run, at, folder, log, stop, checked)
            break
        except NonFinite as found:
            if found.before_update:
                raise health.report(run, at, found, folder) from None
            checked = True
            log.say(f"{found}; back to the last checkpoint, to look at every step from there")
    last, first = at.history[-1], next(iter(run.figures))
    summary = {
        **{key: last[key] for key in run.figures},
        f"best_{first}": at.best,
        "epochs": last["epoch"],
        "seconds": round(at.elapsed, 1),
        "seed": run.config.seed,
        "steps": at.step,
        "bad_images": len(read_list(folder)),
    }
    if "neighbours" in last:
        summary["neighbours"] = last["neighbours"]  # what the top-1 is of
    if summary["bad_images"]:
        log.say(
            f"{summary['bad_images']} image(s) could not be read and were left out; {folder}/bad-images.txt lists them"
        )
    log.event("finished", **summary)
    return summary


def looks_at_every_step(run: Run) -> bool:
    """On a CPU that costs nothing; a GPU would have to be waited for."""
    return run.device.type == "cpu" or run.config.train.skip_nonfinite > 0


def _train_from(run: Run, at: Progress, folder: Path, log: RunLog, stop: StopRequest, checked: bool) -> None:
    """Moves `at` to the end of the run."""
    config, model = run.config, run.model
    if parallel.world() > 1:
        model = DistributedDataParallel(model, device_ids=[run.device.index] if run.device.type == "cuda" else None)
    log.start(at.step, run.total_steps)
    meter = Meter(run, log, at)
    saves = _Saves(run, at, folder, meter)
    if not checked and not at.step:
        saves.save()  # where to go back to from a step that was not looked at
    model.train()
    sampler = run.train_sampler(at.step)
    # closed at once when a run stops: its processes do not hear the signals that this one does
    with contextlib.closing(run.train_batches(sampler, config.data.workers)) as batches:
        while True:
            if _validation_is_due(run, at):
                meter.flush(at.step)
                try:
                    _validate(run, at, stop, folder, log, meter)
                except Stopped:
                    saves.save()
                    raise
                saves.save()
                parallel.wait_for_all()
                meter.resume()
            if at.step == run.total_steps:
                break
            # the processes stop and save together
            number, due = parallel.highest(stop.number, saves.age() >= 60 * config.train.save_minutes)
            if number or due:
                saves.save()
            if number:
                raise Stopped(number, at.step)
            with meter.data.timing(torch.device("cpu")):
                micro = [next(batches) for _ in range(config.train.accumulate)]
            run.schedule.step_update(at.step)
            try:
                done = train_step(model, micro, run, at.step, checked)
            except NonFinite as found:
                if at.skipped == config.train.skip_nonfinite:
                    raise
                at.skipped += 1
                at.step += 1
                log.event("skipped", step=at.step, terms=found.terms)
                log.say(f"{log.label} {found}: left out, {at.skipped} of {config.train.skip_nonfinite}")
            else:
                at.step += 1
                meter.add(at.step, done.losses, done.grad_norm)
    meter.write_to(at)


class _Saves:
    """Checkpoints of one run, each step and number of validations at most once."""

    def __init__(self, run: Run, at: Progress, folder: Path, meter: Meter):
        self.run, self.at, self.folder, self.meter = run, at, folder, meter
        self.saved, self.when = (at.step, len(at.history)) if at.step else None, time.monotonic()

    def save(self) -> None:
        now = (self.at.step, len(self.at.history))
        if now != self.saved:
            self.meter.write_to(self.at)
            resume.save(self.run, self.at, self.folder)
            self.saved = now
        self.when = time.monotonic()

    def age(self) -> float:
        """Seconds since the last one, or since the start."""
        return time.monotonic() - self.when


def _validation_is_due(run: Run, at: Progress) -> bool:
    done = at.history[-1]["step"] if at.history else 0
    boundary = at.step % run.eval_steps == 0 or at.step == run.total_steps
    return boundary and at.step > done


def _validate(run: Run, at: Progress, stop: StopRequest, folder: Path, log: RunLog, meter: Meter) -> None:
    """Adds a validation to `at.history`, and writes best.pt if it is the best. Raises `Stopped`."""
    parallel.copy_buffers_of_first(run.deployed)
    health.expect_finite(run.deployed, at.step)
    size, images = run.eval_batch_size, len(run.val_images)
    rounds = math.ceil(math.ceil(images / size) / parallel.world())
    with contextlib.closing(run.eval_batches(size, run.config.data.workers)) as batches:
        result = run.validate(_until_stopped(batches, rounds, stop, at.step))
    if not math.isfinite(result.get("loss", 0.0)):
        raise UserError(
            f"the loss is not finite: validation after step {at.step}. The last checkpoint is from before.\n{health.ADVICE}"
        )
    at.history.append({"epoch": run.epochs(at.step), "step": at.step} | result)
    first = next(iter(run.figures))
    improved, at.best = result[first] > at.best, max(at.best, result[first])
    log.validation(
        run.figures,
        epochs=run.epochs(run.total_steps),
        steps=run.total_steps,
        best=at.best,
        elapsed_s=meter.elapsed(),
        skipped=at.skipped,
        **at.history[-1],
    )
    if improved and parallel.rank() == 0:  # before last.pt: a run stopped between the two repeats the steps to both
        best = {"student": run.deployed.state_dict(), "step": at.step, first: at.best}
        checkpoint.save(folder / "best.pt", best)


def _until_stopped(batches: Iterator[Any], rounds: int, stop: StopRequest, step: int) -> Iterator[Any]:
    """The batches; every process asks the others in each of the rounds, also when it has no batch left."""
    for _ in range(rounds):
        (number,) = parallel.highest(stop.number)
        if number:
            raise Stopped(number, step)
        batch = next(batches, None)
        if batch is not None:
            yield batch
    yield from batches  # where one call of the sampler's made several
