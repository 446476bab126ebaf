"""Parts of a run that detection and segmentation build alike: optimiser, steps per epoch, input of the card."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim import Optimizer

from scalekd.common.errors import UserError
from scalekd.models.weights.card import short_floats
from scalekd.train.optim import create_optimizer
from scalekd.train.run import check_batch_size

from .decay import layer_groups
from .teacher import TeacherTerm

PROJECTOR = "projector"  # the name of its parameter group and of its part of a checkpoint


def make_optimizer(model: nn.Module, backbone: nn.Module, teacher: TeacherTerm | None, config: Any) -> Optimizer:
    """The recipe's optimiser with layer-wise learning rates, and a rate of its own for the teacher's projector.

    model: all that is trained, with `backbone` and `teacher` in it.
    Raises `UserError` if `schedule.warmup_lr` or `schedule.min_lr` is above the lowest rate, mostly that of the first
    layer: timm's schedules use one value for all groups, so that layer would learn faster than intended.
    """
    optim = config.optim
    projector = dict.fromkeys(teacher.parameters()) if teacher else {}
    rest = [p for p in model.parameters() if p not in projector]
    groups = layer_groups(backbone, rest, optim.lr, optim.weight_decay, optim.stage_decay, optim.backbone_scale)
    if teacher:
        decayed = reversed(param_groups_weight_decay(teacher, optim.weight_decay))  # timm's last group is decayed
        for name, group in zip((PROJECTOR, f"{PROJECTOR}, no decay"), decayed):
            if group["params"]:
                groups.append(group | {"lr": optim.lr * config.teacher.lr_scale, "name": name})
    slowest, schedule = min(groups, key=lambda group: group["lr"]), config.schedule
    named = {PROJECTOR: PROJECTOR, "rest": "other parts"}
    lowest, whose = slowest["lr"], named.get(slowest["name"].partition(",")[0], "first layer")
    warms_up = getattr(schedule, "warmup_epochs", 0) or getattr(schedule, "warmup_iterations", 0)
    for name, rate in (("warmup_lr", schedule.warmup_lr if warms_up else 0.0), ("min_lr", schedule.min_lr)):
        if rate > lowest:
            raise UserError(
                f"schedule.{name} {rate:g} is above the learning rate of the {whose}, {lowest:.2g} with its factors of "
                f"optim.lr; set schedule.{name}=0"
            )
    return create_optimizer(optim, groups)


def projector_of(teacher: TeacherTerm | None) -> dict[str, nn.Module]:
    """The projector as an entry of `Run.parts`; {} without a teacher."""
    return {PROJECTOR: teacher.projector} if teacher else {}


def steps_per_epoch(images: int, config: Any) -> int:
    """Raises `UserError` if the batch is larger than the data or does not divide among the processes."""
    check_batch_size(config.train, images)
    return images // config.train.batch_size


def input_statistics(mean: torch.Tensor | list[float], std: torch.Tensor | list[float]) -> dict[str, list[float]]:
    """The keys `mean` and `std` of a card."""
    return {"mean": short_floats(torch.as_tensor(mean)), "std": short_floats(torch.as_tensor(std))}
