"""Layers in plain numpy, and the checks that every method on maps has to pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import ceil, floor

import numpy as np
import torch
from torch import Tensor, nn


def randomised(module: nn.Module) -> nn.Module:
    """Float64, with every parameter random, so that none can be left out unseen."""
    torch.manual_seed(3)
    for p in module.double().parameters():
        nn.init.normal_(p, std=0.5)
    return module


def weights(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def values(x: Tensor) -> np.ndarray:
    return x.detach().numpy()


# ---------------------------------------------------------------- layers on (B, C, h, w)


def conv(x, weight, bias=None, stride=1, depthwise=False):
    """Odd kernel, zero padding that keeps the grid at stride 1."""
    k = weight.shape[-1]
    padded = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    rows, columns = (range(0, n, stride) for n in x.shape[2:])
    y = np.zeros((len(x), len(weight), len(rows), len(columns)))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            window = padded[:, :, row : row + k, column : column + k]
            rule = "bcij,cij->bc" if depthwise else "bcij,ocij->bo"
            y[:, :, i, j] = np.einsum(rule, window, weight[:, 0] if depthwise else weight)
    return y if bias is None else y + bias[None, :, None, None]


def batch_norm(x, weight, bias):
    y = (x - x.mean((0, 2, 3), keepdims=True)) / np.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)
    return y * weight[None, :, None, None] + bias[None, :, None, None]


def layer_norm(x, weight, bias):
    """Over the channels of each position."""
    y = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    return y * weight[None, :, None, None] + bias[None, :, None, None]


def cells(x, grid):
    """Averaged over cells: cell i of n has the rows from floor(i h / n) to ceil((i + 1) h / n)."""
    h, w = x.shape[2:]
    y = np.zeros((*x.shape[:2], *grid))
    for i in range(grid[0]):
        for j in range(grid[1]):
            rows = slice(floor(i * h / grid[0]), ceil((i + 1) * h / grid[0]))
            columns = slice(floor(j * w / grid[1]), ceil((j + 1) * w / grid[1]))
            y[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return y


def stretch(n: int, m: int) -> np.ndarray:
    """(n, m): linear interpolation from n points to m >= n, by the centres of their cells."""
    at = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    return np.maximum(0, 1 - np.abs(at[None] - np.arange(n)[:, None]))


def resample(x, grid):
    """Averaged over cells where it shrinks, bilinear where it grows."""
    x = cells(x, [min(a, b) for a, b in zip(x.shape[2:], grid)])
    return np.einsum("bchw,hi,wj->bcij", x, stretch(x.shape[2], grid[0]), stretch(x.shape[3], grid[1]))


# ---------------------------------------------------------------- checks


def check_gradients(
    method: nn.Module,
    pair,
    stages: tuple[int, ...] = (1, 2, 3, 4),
    *,
    raw: bool = False,
    logits: bool = False,
    dead: Callable[[str], bool] = lambda name: False,
) -> None:
    """The gradient of the student's maps of `stages` and of its logits is right, and none of it is zero; nor that of
    the method's parameters but `dead` ones. No gradient of anything else, the teacher's included.

    raw: stage 4 is the raw map and not the one after the final norm.
    """
    method = randomised(method)
    student, teacher, targets = pair.features()
    inputs = [student.maps[stage - 1] if raw or stage < 4 else student.final for stage in stages]
    inputs += [student.logits] if logits else []
    others = [x for x in (student.logits, student.final, *student.maps) if all(x is not y for y in inputs)]

    def total(*_: Tensor) -> Tensor:
        torch.manual_seed(5)  # a copy with the same random numbers at each call: a method may draw some, and keep state
        return sum(copy.deepcopy(method)(student, teacher, targets).values())

    assert torch.autograd.gradcheck(total, tuple(inputs), fast_mode=True)
    torch.manual_seed(5)
    sum(method(student, teacher, targets).values()).backward()
    assert all(x.grad.abs().max() > 1e-12 for x in inputs)
    assert all(x.grad is None for x in (*others, teacher.logits, teacher.final, *teacher.maps))
    for name, p in method.named_parameters():
        assert p.grad is not None, name
        assert dead(name) or p.grad.abs().max() > 1e-12, name


def check_half_precision(build: Callable[[], nn.Module], pair, dtype: torch.dtype, rel: float = 0.05) -> None:
    """Maps and logits in half precision, large ones too, under autocast: float32 losses near the exact ones."""
    student, teacher, targets = pair.features(dtype=torch.float32)
    for features in (student, teacher):
        large = [x.detach() * 100 for x in features.maps]  # squares would overflow in fp16
        features.logits, features.final = features.logits.to(dtype), (features.final.detach() * 100).to(dtype)
        features.maps = tuple(x.to(dtype) for x in large)
    method = build()
    copies = copy.deepcopy(method)
    with torch.autocast("cpu", dtype):
        torch.manual_seed(5)
        low = method(student, teacher, targets)
    for features in (student, teacher):
        features.logits, features.final = features.logits.float(), features.final.float()
        features.maps = tuple(x.float() for x in features.maps)
    torch.manual_seed(5)
    full = copies(student, teacher, targets)
    for name, value in low.items():
        assert value.dtype == torch.float32 and value.isfinite()
        assert abs(value.item() - full[name].item()) <= rel * abs(full[name].item()), name
