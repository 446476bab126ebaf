"""Gradient checkpointing of a timm model: `train.grad_checkpointing`.

A block then saves its input only, and runs again in the backward pass (Chen et al., 2016, arXiv:1604.06174). timm's own
`set_grad_checkpointing` is not used, because with it batch norms update their running statistics a second time in the
second run. Here they do not, so the trained model is the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from scalekd.common.errors import UserError

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def recompute_blocks(model: nn.Module, where: str) -> None:
    """Makes the blocks of a timm model run again in the backward pass. `state_dict` and values stay the same.

    where: the recipe key of the model, for the message. Raises `UserError` if timm does not list its stages.
    """
    blocks = list(blocks_of(model))
    if not blocks:
        raise UserError(
            f"{where}: timm does not list the blocks of {type(model).__name__}, so they cannot run again in the backward "
            "pass; set train.grad_checkpointing=false, or lower train.batch_size or raise train.accumulate"
        )
    for block in blocks:
        block.forward = partial(_checkpointed, block.forward)


def blocks_of(model: Any) -> Iterator[nn.Module]:
    """The blocks of a timm model: of each stage in `feature_info`, those in its sequence, or the stage as a whole."""
    for info in getattr(model, "feature_info", ()):
        stage = model.get_submodule(info["module"])
        inside = getattr(stage, "blocks", stage)
        for block in inside.children() if isinstance(inside, nn.Sequential) else (stage,):
            if any(True for _ in block.parameters()):
                yield block


def _checkpointed(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    contexts = partial(_first_and_second, forward.__self__)  # type: ignore[attr-defined]
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **options)


def _first_and_second(
    block: nn.Module,
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """The contexts of the two runs of a block."""
    return contextlib.nullcontext(), _SameStatistics(block)


class _SameStatistics:
    """Batch norms normalise with the statistics of the batch, and leave the running ones and their count as they are.

    A context that can be entered again, because `balance` goes back through a graph several times.
    """

    def __init__(self, block: nn.Module):
        self.block = block
        self.before: list[tuple[Any, float | None, Any]] = []  # of each norm: momentum, count of batches

    def __enter__(self) -> None:
        for norm in self.block.modules():
            if isinstance(norm, NORMS) and norm.training and norm.track_running_stats:
                self.before.append((norm, norm.momentum, norm.num_batches_tracked))
                norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *error: object) -> None:
        while self.before:
            norm, momentum, batches = self.before.pop()
            norm.momentum, norm.num_batches_tracked = momentum, batches
