"""What detection and segmentation share when a run is built: model, optimiser, steps of an epoch."""

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


def optimizer_of(model: nn.Module, backbone: nn.Module, config: Any) -> Optimizer:
    optim = config.optim
    groups = layer_groups(backbone, model.parameters(), optim.lr, optim.weight_decay, optim.stage_decay)
    lowest, schedule = min(group["lr"] for group in groups), config.schedule
    warms_up = getattr(schedule, "warmup_epochs", 0) or getattr(schedule, "warmup_iterations", 0)
    for name, rate in (("warmup_lr", schedule.warmup_lr if warms_up else 0.0), ("min_lr", schedule.min_lr)):
        if rate > lowest:
            raise UserError(
                f"schedule.{name} {rate:g} is above the rate of the first layer, {lowest:.2g} after optim.stage_decay "
                f"{optim.stage_decay:g}: that layer would learn faster than it should; set schedule.{name}=0"
            )
    return create_optimizer(optim, groups)


def steps_per_epoch(images: int, config: Any) -> int:
    """Raises `UserError` for a batch that is larger than the data, or does not divide."""
    check_batch_size(config.train, images)
    return images // config.train.batch_size


def input_of(mean: torch.Tensor | list[float], std: torch.Tensor | list[float]) -> dict[str, list[float]]:
    """A card's mean and std."""
    return {"mean": short_floats(torch.as_tensor(mean)), "std": short_floats(torch.as_tensor(std))}
