"""Pixels at the edge of an image that a model does not look at: patches of 14 leave two of a hundred over."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn


class Unseen(NamedTuple):
    rows: int  # at the bottom, without any effect
    columns: int  # on the right
    steps: tuple[int, int]  # pixels by which the height and the width that are looked at grow


class _Reached(Exception):
    def __init__(self, conv: nn.Conv2d, shape: torch.Size):
        self.conv, self.shape = conv, shape


def unseen(model: nn.Module, channels: int, size: tuple[int, int]) -> Unseen | None:
    """What the model's first convolution leaves out of images of `size`, found by its gradient to one; None for nothing.

    Only the model's steps up to there are run, so padding before it and in it counts. None as well where no
    convolution is met, or an image that was made smaller.
    """
    first = _first_convolution(model, channels, size)
    if first is None or any(met < whole for met, whole in zip(first.shape[-2:], size)):
        return None
    weight = first.conv.weight
    images = torch.zeros(1, *first.shape[1:], device=weight.device, dtype=weight.dtype, requires_grad=True)
    with torch.enable_grad():
        out = first.conv.forward(images)  # not called: no hooks
        (gradient,) = torch.autograd.grad(out, images, torch.ones_like(out))
    seen = gradient[0, :, : size[0], : size[1]].abs().sum(0) > 0
    if not seen.any():
        return None
    rows, columns = (whole - int(seen.any(dim).nonzero().max()) - 1 for whole, dim in zip(size, (1, 0)))
    steps = first.conv.stride
    return Unseen(rows, columns, (int(steps[0]), int(steps[1]))) if rows or columns else None


def _first_convolution(model: nn.Module, channels: int, size: tuple[int, int]) -> _Reached | None:
    def stop(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        raise _Reached(module, inputs[0].shape)

    hooks = [m.register_forward_pre_hook(stop) for m in model.modules() if isinstance(m, nn.Conv2d)]
    training = [m for m in model.modules() if m.training]
    parameter = next(model.parameters())
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, channels, *size, device=parameter.device, dtype=parameter.dtype))
    except _Reached as reached:
        return reached
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return None


def whole_sizes(left_out: Unseen, size: tuple[int, int]) -> tuple[list[int], list[int]]:
    """The nearest (height, width) of which all is looked at: below, and above."""
    below = [whole - rest for whole, rest in zip(size, left_out[:2])]
    above = [b + step if rest else b for b, step, rest in zip(below, left_out.steps, left_out[:2])]
    return below, above
