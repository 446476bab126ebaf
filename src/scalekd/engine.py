"""Training: `train` runs what `build` made, `train_step` is one optimiser step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from . import checkpoint, health, parallel, resume
from .build import Run
from .data import Batch, eval_batches, seed_everything, train_batches
from .errors import UserError
from .health import NonFinite
from .images import read_list
from .meter import Meter
from .resume import Progress
from .runlog import RunLog
from .stop import Stopped, StopRequest

AUTOCAST = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# ---------------------------------------------------------------- one step


class Step(NamedTuple):
    losses: dict[str, Tensor]  # mean of each term over the micro-batches, on the device
    grad_norm: Tensor  # of all gradients together, before clipping


def train_step(model: nn.Module, batches: Sequence[Batch], run: Run, step: int, checked: bool = False) -> Step:
    """One optimiser step over the micro-batches.

    model: the distiller, or its DDP wrapper. step: how many came before.
    checked: wait for the losses and the gradient before the update; raises `NonFinite`, with everything as it was.
    """
    train, distiller = run.config.train, run.distiller
    buffers = [b.clone() for b in distiller.buffers()] if checked else []
    losses: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        # randomness of mixup and drop path follows from the place in the global batch, as the samples' does
        seed_everything(run.config.seed, step, i * parallel.world() + parallel.rank())
        images, targets = on_device(batch, run)
        last = i == len(batches) - 1
        # the processes' gradients are averaged once, with the last micro-batch
        alone = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()
        with alone:
            with torch.autocast(run.device.type, AUTOCAST[train.precision], enabled=train.precision != "float32"):
                known = run.teacher_outputs and run.teacher_outputs.features(step * len(batches) + i, images)
                of_batch = model(images, targets, known) if known else model(images, targets)
            run.scaler.scale(of_batch["total"] / len(batches)).backward()
        for name, value in of_batch.items():
            losses[name] = losses.get(name, 0) + value.detach() / len(batches)
    run.scaler.unscale_(run.optimizer)
    gradients = [p.grad for p in distiller.parameters() if p.grad is not None]
    grad_norm = get_total_norm(gradients)
    if checked:
        try:
            health.check_step(step + 1, losses, grad_norm, run.scaler.is_enabled())
        except NonFinite:
            run.optimizer.zero_grad()
            with torch.no_grad():
                for buffer, before in zip(distiller.buffers(), buffers):
                    buffer.copy_(before)
            raise
    if train.clip_grad:
        clip_grads_with_norm_(distiller.parameters(), train.clip_grad, grad_norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    if run.ema:
        run.ema.update(distiller.student, step=step)
    return Step(losses, grad_norm)


def on_device(batch: Batch, run: Run) -> tuple[Tensor, Tensor]:
    images = batch.images.to(run.device, non_blocking=True).float() / 255
    targets = batch.targets.to(run.device, non_blocking=True)
    if run.config.train.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return mixed(images, targets, run.mixup) if run.mixup else (images, targets)


def mixed(images: Tensor, targets: Tensor, mixup: Mixup) -> tuple[Tensor, Tensor]:
    """Mixup among the labelled images, which come first, and among the others; targets (L, classes) of the former."""
    labelled = len(targets)
    if labelled == len(images):
        return mixup(images, targets)
    nothing = targets.new_zeros(len(images) - labelled)
    others, _ = mixup(images[labelled:], nothing)
    if not labelled:
        return others, targets
    first, soft = mixup(images[:labelled], targets)
    return torch.cat([first, others]), soft


# ---------------------------------------------------------------- a whole run


def train(run: Run, folder: Path, log: RunLog, stop: StopRequest | None = None) -> dict[str, Any]:
    """Trains to the end, from the newest checkpoint in `folder` if there is one. Returns the summary that it also logs.

    Writes last.pt every `train.save_minutes` and at every validation, best.pt when top-1 is the best so far.
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
            top1, top5 = _train_from(run, at, folder, log, stop, checked)
            break
        except NonFinite as found:
            if found.before_update:
                raise health.report(run, at, found, folder) from None
            checked = True
            log.say(f"{found}; back to the last checkpoint, to look at every step from there")
    summary = {
        "top1": top1,
        "top5": top5,
        "best_top1": at.best_top1,
        "epochs": run.config.train.epochs,
        "seconds": round(at.elapsed, 1),
        "seed": run.config.seed,
        "steps": at.step,
        "bad_images": len(read_list(folder)),
    }
    if not run.has_classifier:
        summary["neighbours"] = at.history[-1]["neighbours"]  # what the top-1 is of
    if summary["bad_images"]:
        log.say(
            f"{summary['bad_images']} image(s) could not be read and were left out; {folder}/bad-images.txt lists them"
        )
    log.event("finished", **summary)
    return summary


def looks_at_every_step(run: Run) -> bool:
    """On a CPU that costs nothing; a GPU would have to be waited for."""
    return run.device.type == "cpu" or run.config.train.skip_nonfinite > 0


def _train_from(
    run: Run, at: Progress, folder: Path, log: RunLog, stop: StopRequest, checked: bool
) -> tuple[float, float]:
    """Moves `at` to the end of the run; returns the last validation's top-1 and top-5."""
    config, distiller, on_gpu = run.config, run.distiller, run.device.type == "cuda"
    model: nn.Module = distiller
    if parallel.world() > 1:
        model = DistributedDataParallel(distiller, device_ids=[run.device.index] if on_gpu else None)
    log.start(at.step, run.total_steps)
    meter = Meter(config.train, log, run.optimizer, distiller.teacher_clock, run.steps_per_epoch, at)
    saves = _Saves(run, at, folder, meter)
    if not checked and not at.step:
        saves.save()  # where to go back to from a step that was not looked at
    distiller.train()
    sampler = health.train_sampler(run, at.step)
    # closed at once when a run stops: its processes do not hear the signals that this one does
    with contextlib.closing(train_batches(run.train_images, sampler, config.data.workers, pin=on_gpu)) as batches:
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
    return at.history[-1]["top1"], at.history[-1]["top5"]


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
    boundary = at.step % (run.steps_per_epoch * run.config.train.eval_every) == 0 or at.step == run.total_steps
    return boundary and at.step > done


def _validate(run: Run, at: Progress, stop: StopRequest, folder: Path, log: RunLog, meter: Meter) -> None:
    """Adds a validation to `at.history`, and writes best.pt if it is the best. Raises `Stopped`."""
    parallel.copy_buffers_of_first(run.deployed)
    part = run.config.train.batch_size // (run.config.train.accumulate * parallel.world())
    size = min(256, 4 * part)  # without gradients, four times as many fit
    pin = run.device.type == "cuda"
    batches = eval_batches(run.val_images, size, run.config.data.workers, pin, parallel.rank(), parallel.world())
    rounds = math.ceil(math.ceil(len(run.val_images) / size) / parallel.world())
    with contextlib.closing(batches):
        heard = _until_stopped(batches, rounds, stop, at.step)
        result = run.validate(heard)
    if not math.isfinite(result.get("loss", 0.0)):
        raise UserError(
            f"the loss is not finite: validation after step {at.step}. The last checkpoint is from before.\n{health.ADVICE}"
        )
    at.history.append({"epoch": at.step // run.steps_per_epoch, "step": at.step} | result)
    improved, at.best_top1 = result["top1"] > at.best_top1, max(at.best_top1, result["top1"])
    log.validation(
        epochs=run.config.train.epochs,
        best=at.best_top1,
        elapsed_s=meter.elapsed(),
        skipped=at.skipped,
        **at.history[-1],
    )
    if improved and parallel.rank() == 0:  # before last.pt: a run stopped between the two repeats the steps to both
        best = {"student": run.deployed.state_dict(), "step": at.step, "top1": at.best_top1}
        checkpoint.save(folder / "best.pt", best)


def _until_stopped(batches: Iterator[Batch], rounds: int, stop: StopRequest, step: int) -> Iterator[Batch]:
    """The batches; every process asks the others in each of the rounds, also when it has no batch left."""
    for _ in range(rounds):
        (number,) = parallel.highest(stop.number)
        if number:
            raise Stopped(number, step)
        batch = next(batches, None)
        if batch is not None:
            yield batch
