"""Folds batch norms into the convolutions before them, and writes folded weights back into a plain timm model."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

# others, such as timm's weight-standardised convolutions, do not use their weight as it is
PLAIN_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)


class Folded(NamedTuple):
    """A student without the batch norms that follow a convolution."""

    student: nn.Module
    pairs: list[tuple[str, str]]  # names of (convolution, batch norm that was folded into it)


@torch.no_grad()
def fold_batch_norms(student: nn.Module, images: Tensor) -> Folded:
    """A copy in eval mode whose outputs are those of `student` up to rounding.

    images: normalised, to find which batch norm gets the output of which convolution. If the folded copy gives other
    outputs, because a model uses such an output twice, nothing is folded.
    """
    copied = copy.deepcopy(student).cpu().eval()
    before = copied(images)
    pairs = _pairs(copied, images)
    for convolution, norm in pairs:
        _fold(copied, convolution, norm)
    scale = 1 + before.abs().max()
    if (copied(images) - before).abs().max() > 1e-3 * scale:
        return Folded(copy.deepcopy(student).cpu().eval(), [])
    return Folded(copied, pairs)


def _pairs(model: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Convolutions that run once, with the batch norm that gets their output."""
    made: dict[int, str] = {}  # id of an output -> its convolution
    kept: list[Tensor] = []  # so that no id is used twice
    calls: list[str] = []
    found: list[tuple[str, str]] = []

    def after(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            made[id(output)] = name
            kept.append(output)
            calls.append(name)

        return hook

    def before(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            calls.append(name)
            if id(given[0]) in made:
                found.append((made[id(given[0])], name))

        return hook

    hooks = [
        module.register_forward_hook(after(name))
        for name, module in model.named_modules()
        if type(module) in PLAIN_CONVOLUTIONS
    ]
    hooks += [
        module.register_forward_pre_hook(before(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return [pair for pair in found if all(calls.count(name) == 1 for name in pair)]


def _fold(model: nn.Module, convolution: str, norm: str) -> None:
    conv: Any = model.get_submodule(convolution)
    bn: Any = model.get_submodule(norm)
    factor, shift = _affine(bn)
    bias = torch.zeros_like(shift) if conv.bias is None else conv.bias
    conv.weight = nn.Parameter(conv.weight * factor.view(-1, 1, 1, 1))
    conv.bias = nn.Parameter(bias * factor + shift)
    # timm's BatchNormAct2d also holds the activation
    kept = [part for name in ("drop", "act") if (part := getattr(bn, name, None)) is not None]
    model.set_submodule(norm, nn.Sequential(*kept) if kept else nn.Identity())


def _affine(bn: Any) -> tuple[Tensor, Tensor]:
    """(factor, shift) of a batch norm in eval mode, per channel."""
    factor = (bn.running_var + bn.eps).rsqrt()
    if bn.weight is not None:
        factor = factor * bn.weight
    shift = -bn.running_mean * factor
    return factor, shift if bn.bias is None else shift + bn.bias


@torch.no_grad()
def unfold(folded: dict[str, Tensor], pairs: list[tuple[str, str]], student: Any) -> None:
    """Loads a folded state into `student`, a plain timm model. Its outputs are then the folded student's up to rounding.

    The batch norm of a pair gets the mean 0, the variance 1 - eps and the factor 1, and adds the bias.
    """
    state = student.state_dict()
    new = {name: value for name, value in folded.items() if name in state}
    for convolution, norm in pairs:
        bn = student.get_submodule(norm)
        if student.get_submodule(convolution).bias is not None:
            new[f"{convolution}.bias"] = torch.zeros_like(folded[f"{convolution}.bias"])
        new[f"{norm}.running_mean"] = torch.zeros_like(bn.running_mean)
        new[f"{norm}.running_var"] = torch.full_like(bn.running_var, 1 - bn.eps)
        new[f"{norm}.num_batches_tracked"] = state[f"{norm}.num_batches_tracked"]
        new[f"{norm}.weight"] = torch.ones_like(bn.running_var)
        new[f"{norm}.bias"] = folded[f"{convolution}.bias"]
    student.load_state_dict(new)
