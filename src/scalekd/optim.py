"""Parameter groups, optimiser and schedule, through timm's factories."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from timm.optim import create_optimizer_v2, get_optimizer_info, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from .config import BaseOptim, Config
from .distiller import Distiller


def make_optimizer(config: Config, distiller: Distiller) -> Optimizer:
    """The student at `optim.lr`, the methods' own parameters at `optim.projector_lr` times that."""
    optim = config.optim
    groups = _groups(distiller.student, config, optim.lr) + _groups(
        distiller.methods, config, optim.lr * optim.projector_lr
    )
    return of_groups(optim, groups)


def of_groups(optim: BaseOptim, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimiser that a recipe names, through timm's factory, with these parameter groups; fused where PyTorch has that."""
    info = get_optimizer_info(optim.name)
    extra: dict[str, Any] = ({"betas": optim.betas} if info.has_betas else {}) | (
        {"eps": optim.eps} if info.has_eps else {}
    )
    if can_be_fused(optim.name, groups):
        extra["fused"] = True
    return create_optimizer_v2(
        groups,
        opt=optim.name,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        filter_bias_and_bn=False,
        **extra,
    )


def can_be_fused(name: str, groups: Iterable[dict[str, Any]]) -> bool:
    """Whether PyTorch has one kernel for the whole update of these parameters: SGD, Adam and AdamW on a CPU or a GPU.

    It gives the same values but for rounding, and holds no copies of the parameters meanwhile (docs/performance.md).
    """
    made = get_optimizer_info(name).opt_class  # a name where another package has the class
    devices = {p.device.type for group in groups for p in group["params"]}
    return isinstance(made, type) and "fused" in inspect.signature(made).parameters and devices <= {"cpu", "cuda"}


def _groups(module: nn.Module, config: Config, lr: float) -> list[dict[str, Any]]:
    decay = config.optim.weight_decay
    if config.optim.decay_norm_and_bias:
        groups = [{"params": [p for p in module.parameters() if p.requires_grad], "weight_decay": decay}]
    else:
        exempt: Iterable[str] = getattr(module, "no_weight_decay", tuple)()
        groups = param_groups_weight_decay(module, decay, no_weight_decay_list=exempt)
    return [group | {"lr": lr} for group in groups if group["params"]]


def make_schedule(config: Any, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
    """timm's schedule for a recipe's `schedule` and `train.epochs`, counted in steps: call `schedule.step_update(step)` before each step."""
    s, epochs = config.schedule, config.train.epochs
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=s.name,
        num_epochs=epochs,
        warmup_epochs=s.warmup_epochs,
        warmup_lr=s.warmup_lr,
        warmup_prefix=False,
        min_lr=s.min_lr,
        decay_milestones=list(s.milestones),
        decay_rate=s.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    assert schedule is not None
    return schedule


def make_iteration_schedule(schedule: Any, iterations: int, optimizer: Optimizer) -> Scheduler:
    """timm's cosine or polynomial schedule over `iterations` steps. schedule: a recipe's, with `warmup_iterations`."""
    made, _ = create_scheduler_v2(
        optimizer,
        sched=schedule.name,
        num_epochs=iterations,
        warmup_epochs=schedule.warmup_iterations,
        warmup_lr=schedule.warmup_lr,
        warmup_prefix=False,
        min_lr=schedule.min_lr,
        decay_rate=schedule.power,  # what timm's factory takes as the power of `poly`
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    assert made is not None
    return made
