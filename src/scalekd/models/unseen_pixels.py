"""Finds pixels lost because the image size is not a multiple of the patch size: 14 leaves 2 of 100 over."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn


class Unseen(NamedTuple):
    """Pixels without any effect on the model."""

    rows: int  # at the bottom
    columns: int  # on the right
    steps: tuple[int, int]  # strides: pixels by which the used height and width grow


class _Reached(Exception):
    """Ends a forward pass at its first convolution."""

    def __init__(self, conv: nn.Conv2d, shape: torch.Size):
        self.conv, self.shape = conv, shape


def unseen(model: nn.Module, channels: int, size: tuple[int, int]) -> Unseen | None:
    """The rows and columns of images of `size` (height, width) that the model's first convolution ignores; None if none.

    Computed from the convolution's gradient with respect to its input. The model runs up to that convolution, so padding
    before and in it counts. Also None for a model without convolution, or one that first shrinks its images.
    """
    first = _first_convolution(model, channels, size)
    if first is None or any(received < full for received, full in zip(first.shape[-2:], size)):
        return None
    weight = first.conv.weight
    images = torch.zeros(1, *first.shape[1:], device=weight.device, dtype=weight.dtype, requires_grad=True)
    with torch.enable_grad():
        out = first.conv.forward(images)  # without its hooks
        (gradient,) = torch.autograd.grad(out, images, torch.ones_like(out))
    used = gradient[0, :, : size[0], : size[1]].abs().sum(0) > 0
    if not used.any():
        return None
    rows, columns = (full - int(used.any(dim).nonzero().max()) - 1 for full, dim in zip(size, (1, 0)))
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


def whole_sizes(ignored: Unseen, size: tuple[int, int]) -> tuple[list[int], list[int]]:
    """The nearest (height, width) below and above `size` that the model uses completely."""
    below = [full - rest for full, rest in zip(size, ignored[:2])]
    above = [b + step if rest else b for b, step, rest in zip(below, ignored.steps, ignored[:2])]
    return below, above
