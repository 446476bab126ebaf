"""Parts of a run that detection and segmentation build alike: optimiser, steps per epoch, input of the card."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from scalekd.common.errors import UserError
from scalekd.models.weights.card import short_floats
from scalekd.train.optim import create_optimizer
from scalekd.train.run import check_batch_size

from .decay import layer_groups


def make_optimizer(model: nn.Module, backbone: nn.Module, config: Any) -> Optimizer:
    """The recipe's optimiser with layer-wise learning rates.

    Raises `UserError` if `schedule.warmup_lr` or `schedule.min_lr` is above the rate of the first layer: timm's
    schedules use one value for all groups, so that layer would learn faster than intended.
    """
    optim = config.optim
    groups = layer_groups(backbone, model.parameters(), optim.lr, optim.weight_decay, optim.stage_decay)
    lowest, schedule = min(group["lr"] for group in groups), config.schedule
    warms_up = getattr(schedule, "warmup_epochs", 0) or getattr(schedule, "warmup_iterations", 0)
    for name, rate in (("warmup_lr", schedule.warmup_lr if warms_up else 0.0), ("min_lr", schedule.min_lr)):
        if rate > lowest:
            raise UserError(
                f"schedule.{name} {rate:g} is above the learning rate of the first layer, {lowest:.2g} after "
                f"optim.stage_decay {optim.stage_decay:g}; set schedule.{name}=0"
            )
    return create_optimizer(optim, groups)


def steps_per_epoch(images: int, config: Any) -> int:
    """Raises `UserError` if the batch is larger than the data or does not divide among the processes."""
    check_batch_size(config.train, images)
    return images // config.train.batch_size


def input_statistics(mean: torch.Tensor | list[float], std: torch.Tensor | list[float]) -> dict[str, list[float]]:
    """The keys `mean` and `std` of a card."""
    return {"mean": short_floats(torch.as_tensor(mean)), "std": short_floats(torch.as_tensor(std))}
