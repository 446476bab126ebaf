"""Creates optimisers and learning-rate schedules with timm's factories."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from .options import BaseOptim


def create_optimizer(optim: BaseOptim, groups: list[dict[str, Any]]) -> Optimizer:
    """The recipe's optimiser for these parameter groups; fused if `can_be_fused`.

    Move the parameters to their device and memory format first: a fused update expects gradients with the same layout.
    """
    info = get_optimizer_info(optim.name)
    extra: dict[str, Any] = ({"betas": optim.betas} if info.has_betas else {}) | (
        {"eps": optim.eps} if info.has_eps else {}
    )
    fused = can_be_fused(optim.name, groups)
    made = create_optimizer_v2(
        groups,
        opt=optim.name,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        filter_bias_and_bn=False,
        **extra | ({"fused": True} if fused else {}),
    )
    if fused and isinstance(made, torch.optim.SGD):
        # otherwise the first step creates uninitialised buffers, and keeps them if an fp16 gradient overflows
        for parameter in (p for group in made.param_groups if group["momentum"] for p in group["params"]):
            made.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return made


def can_be_fused(name: str, groups: Iterable[dict[str, Any]]) -> bool:
    """Whether PyTorch has a fused kernel for this update: SGD, Adam and AdamW on CPUs and GPUs.

    It gives the same values up to rounding, and needs no temporary copies of the parameters
    (docs/explanation/performance-tables.md).
    """
    devices = {p.device.type for group in groups for p in group["params"]}
    one_kernel = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
    return get_optimizer_info(name).opt_class in one_kernel and devices <= {"cpu", "cuda"}


def load_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict`. If the checkpoint's optimiser was not fused, this one is no longer fused either."""
    optimizer.load_state_dict(state)
    # a gradient scaler passes its result to fused optimisers only; the others would raise
    optimizer._step_supports_amp_scaling = any(g.get("fused") for g in optimizer.param_groups)  # type: ignore[attr-defined]


def make_schedule(config: Any, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
    """timm's schedule for a recipe's `schedule` and `train.epochs`. Call `schedule.step_update(step)` before each step."""
    s = config.schedule
    return _per_step(
        optimizer,
        s,
        num_epochs=config.train.epochs,
        warmup_epochs=s.warmup_epochs,
        updates_per_epoch=steps_per_epoch,
        decay_milestones=list(s.milestones),
        decay_rate=s.decay_rate,
    )


def make_iteration_schedule(schedule: Any, iterations: int, optimizer: Optimizer) -> Scheduler:
    """timm's cosine or polynomial schedule over `iterations` steps. schedule: a section with `warmup_iterations`."""
    return _per_step(
        optimizer,
        schedule,
        num_epochs=iterations,
        warmup_epochs=schedule.warmup_iterations,
        updates_per_epoch=1,
        decay_rate=schedule.power,  # timm's factory uses it as the power of `poly`
    )


def _per_step(optimizer: Optimizer, section: Any, **lengths: Any) -> Scheduler:
    """A schedule that changes the learning rate at every step. lengths: arguments of timm's factory."""
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=section.name,
        warmup_lr=section.warmup_lr,
        warmup_prefix=False,
        min_lr=section.min_lr,
        step_on_epochs=False,
        **lengths,
    )
    assert schedule is not None
    return schedule
