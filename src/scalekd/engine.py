"""Training: `build` makes everything a recipe names, `train` runs it, `train_step` is one optimiser step."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from . import checkpoint, parallel
from .config import Config, height_and_width
from .data import (
    Batch,
    Images,
    TrainSampler,
    eval_batches,
    make_mixup,
    open_split,
    seed_everything,
    train_batches,
    training_images,
    validation_images,
)
from .distiller import Distiller
from .errors import UserError, first_line
from .evaluate import evaluate
from .meter import Meter, refuse_non_finite
from .models import Loaded, build_model, statistics
from .optim import make_optimizer, make_schedule
from .runlog import RunLog

AUTOCAST = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Run:
    """Everything that a recipe names, built."""

    config: Config
    device: torch.device
    classes: list[str]
    train_images: Images
    val_images: Images
    distiller: Distiller
    loaded: dict[str, Loaded]  # of "student" and "teacher"
    optimizer: Optimizer
    schedule: Scheduler
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    mixup: Mixup | None
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.config.train.epochs

    @property
    def deployed(self) -> nn.Module:
        """The student that is evaluated and exported: the averaged one where there is one."""
        return self.ema.module if self.ema is not None else self.distiller.student


def build(config: Config, device: torch.device) -> Run:
    """Opens the data and builds models, methods, optimiser and schedule. Raises `UserError`."""
    seed_everything(config.seed, "models")
    data, train = config.data, config.train
    size = height_and_width(data.image_size)
    teacher_size = height_and_width(config.teacher.image_size or size) if config.teacher else size
    split = open_split(data)
    classes = len(split.classes)
    student, student_loaded = build_model(
        config.student, channels=data.channels, image_size=size, classes=classes, where="student"
    )
    student_stats = statistics(student, config.student, data.channels, "student")
    loaded = {"student": student_loaded}
    teacher = teacher_stats = None
    if config.teacher:
        head = None if config.teacher.weights == "pretrained" else classes
        teacher, loaded["teacher"] = build_model(
            config.teacher, channels=data.channels, image_size=teacher_size, classes=head, where="teacher"
        )
        teacher_stats = statistics(teacher, config.teacher, data.channels, "teacher")
    images = training_images(split, data, config.augment, *student_stats, config.seed)
    _check_batch(config, len(images))
    if train.sync_batchnorm and device.type == "cpu":
        raise UserError("train.sync_batchnorm needs GPUs; torch has it for CUDA only")
    if train.sync_batchnorm:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    distiller = Distiller(
        student,
        teacher,
        config.losses,
        image_size=size,
        teacher_size=teacher_size,
        student_stats=student_stats,
        teacher_stats=teacher_stats,
        student_cuts=config.student.cuts,
        teacher_cuts=config.teacher.cuts if config.teacher else None,
    )
    if train.sync_batchnorm:
        distiller.methods = nn.SyncBatchNorm.convert_sync_batchnorm(distiller.methods)
    distiller.to(device)
    if train.channels_last:
        distiller.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(config, distiller)
    steps_per_epoch = len(images) // train.batch_size
    return Run(
        config,
        device,
        split.classes,
        images,
        validation_images(split, data, config.augment),
        distiller,
        loaded,
        optimizer,
        make_schedule(config, optimizer, steps_per_epoch),
        torch.amp.GradScaler(device.type, enabled=train.precision == "fp16"),
        ModelEmaV3(student, decay=train.ema, use_warmup=True) if train.ema else None,
        make_mixup(config.augment, classes),
        steps_per_epoch,
    )


def _check_batch(config: Config, images: int) -> None:
    train, parts = config.train, config.train.accumulate * parallel.world()
    if images < train.batch_size:
        raise UserError(f"train.batch_size {train.batch_size} is more than the {images} training images; lower it")
    if train.batch_size % parts:
        raise UserError(
            f"train.batch_size {train.batch_size} does not divide among {parallel.world()} processes x "
            f"{train.accumulate} accumulated steps; make it a multiple of {parts}"
        )
    if train.batch_size == parts:
        raise UserError("one image per process and step: batch normalisation needs two or more; raise train.batch_size")
    if (config.augment.mixup or config.augment.cutmix) and train.batch_size // parts % 2:
        raise UserError(
            f"mixup pairs images: {train.batch_size // parts} per process and step is odd; change train.batch_size"
        )


# ---------------------------------------------------------------- one step


def train_step(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], run: Run, step: int) -> dict[str, Tensor]:
    """One optimiser step over the micro-batches. Returns the mean of each loss term, on the device.

    model: the distiller, or its DDP wrapper. batches: (images uint8 or [0, 1], targets) on the device.
    step: how many came before; the average of weights forgets faster in the beginning.
    """
    train, distiller = run.config.train, run.distiller
    sums: dict[str, Tensor] = {}
    for i, (images, targets) in enumerate(batches):
        last = i == len(batches) - 1
        # the processes' gradients are averaged once, with the last micro-batch
        alone = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()
        with alone:
            with torch.autocast(run.device.type, AUTOCAST[train.precision], enabled=train.precision != "float32"):
                losses = model(images, targets)
            run.scaler.scale(losses["total"] / len(batches)).backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach() / len(batches)
    if train.clip_grad:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(distiller.parameters(), train.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    if run.ema:
        run.ema.update(distiller.student, step=step)
    return sums


def on_device(batch: Batch, run: Run) -> tuple[Tensor, Tensor]:
    images = batch.images.to(run.device, non_blocking=True).float() / 255
    targets = batch.targets.to(run.device, non_blocking=True)
    if run.config.train.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return run.mixup(images, targets) if run.mixup else (images, targets)


# ---------------------------------------------------------------- a whole run


def train(run: Run, folder: Path, log: RunLog) -> dict[str, Any]:
    """Trains to the end, from `folder/last.pt` if it is there. Returns the summary that it also logs.

    Writes last.pt after every validation and best.pt when top-1 is the best so far.
    Raises `UserError` when the loss is not finite; what was saved before stays.
    """
    config, distiller = run.config, run.distiller
    last, best = folder / "last.pt", folder / "best.pt"
    step, best_top1, elapsed = 0, -1.0, 0.0
    history: list[dict[str, Any]] = []
    if last.exists():
        step, best_top1, history, elapsed = restore(run, last)
        log.say(f"{log.label} goes on from step {step} of {run.total_steps}")
    model: nn.Module = distiller
    if parallel.world() > 1:
        model = DistributedDataParallel(distiller, device_ids=[run.device.index] if run.device.type == "cuda" else None)
    sampler = TrainSampler(
        len(run.train_images),
        config.train.batch_size,
        config.seed,
        run.total_steps,
        step,
        config.train.accumulate,
        parallel.rank(),
        parallel.world(),
    )
    batches = train_batches(run.train_images, sampler, config.data.workers, pin=run.device.type == "cuda")
    meter = Meter(
        config.train,
        log,
        run.optimizer,
        distiller.teacher_clock,
        steps_per_epoch=run.steps_per_epoch,
        step=step,
        elapsed=elapsed,
    )
    log.start(step, run.total_steps)
    distiller.train()
    while step < run.total_steps:
        with meter.data.timing(torch.device("cpu")):
            micro = [next(batches) for _ in range(config.train.accumulate)]
        # the step's own randomness (mixup, drop path) follows from its number, as the samples' does
        seed_everything(config.seed, step, parallel.rank())
        run.schedule.step_update(step)
        losses = train_step(model, [on_device(b, run) for b in micro], run, step)
        step += 1
        meter.add(step, losses)
        if step % (run.steps_per_epoch * config.train.eval_every) == 0 or step == run.total_steps:
            meter.flush(step)
            result = _validate(run)
            refuse_non_finite({"validation": result["loss"]}, f"after step {step}")
            history.append({"epoch": step // run.steps_per_epoch, "step": step} | result)
            improved, best_top1 = result["top1"] > best_top1, max(best_top1, result["top1"])
            log.validation(epochs=config.train.epochs, best=best_top1, elapsed_s=meter.elapsed(), **history[-1])
            if parallel.rank() == 0:
                state = snapshot(run, step, best_top1, history, meter.elapsed())
                if improved:  # before last.pt: a run stopped between the two repeats the steps to both
                    checkpoint.save(best, {"student": state["deployed"], "step": step, "top1": best_top1})
                checkpoint.save(last, state)
            parallel.wait_for_all()
            meter.resume()
    summary = {
        "top1": history[-1]["top1"],
        "top5": history[-1]["top5"],
        "best_top1": best_top1,
        "epochs": config.train.epochs,
        "seconds": round(meter.elapsed(), 1),
        "seed": config.seed,
        "steps": step,
    }
    log.event("finished", **summary)
    return summary


def _validate(run: Run) -> dict[str, float]:
    d = run.distiller
    parallel.copy_buffers_of_first(run.deployed)
    batches = eval_batches(
        run.val_images,
        max(1, min(256, len(run.val_images))),
        run.config.data.workers,
        run.device.type == "cuda",
        parallel.rank(),
        parallel.world(),
    )
    return evaluate(run.deployed, batches, d.student_mean, d.student_std, run.device)


def snapshot(run: Run, step: int, best_top1: float, history: list[dict[str, Any]], elapsed: float) -> dict[str, Any]:
    """A checkpoint: separate entries for student, method parameters, optimiser and position."""
    return {
        "student": run.distiller.student.state_dict(),
        "methods": run.distiller.methods.state_dict(),
        "deployed": run.deployed.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "ema": run.ema.state_dict() if run.ema else None,
        "step": step,
        "best_top1": best_top1,
        "history": history,
        "elapsed": elapsed,
    }


def restore(run: Run, path: Path) -> tuple[int, float, list[dict[str, Any]], float]:
    """Step, best top-1, history and seconds so far. Raises `UserError` for a checkpoint that is not this run's."""
    state = checkpoint.load(path)
    try:
        run.distiller.student.load_state_dict(state["student"])
        run.distiller.methods.load_state_dict(state["methods"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.scaler.load_state_dict(state["scaler"])
        if run.ema:
            run.ema.load_state_dict(state["ema"])
        return state["step"], state["best_top1"], state["history"], state["elapsed"]
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not of this recipe's run: {first_line(error)}\n"
            "Remove it to start this run anew, or put back a copy."
        ) from None
