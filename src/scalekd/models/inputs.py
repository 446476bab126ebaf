"""The input that a model expects: size, mean, std and interpolation; and uint8 images as such an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from scalekd.common.errors import UserError

from . import added  # noqa: F401 - adds models to timm
from .options import Model

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, one value per channel


def scaled(images: Tensor) -> Tensor:
    """uint8 images to float32 pixels in [0, 1], same shape."""
    return images.float() / 255


def per_channel(values: Sequence[float] | Tensor) -> Tensor:
    """One value per channel, (C,), shaped to broadcast over images: (1, C, 1, 1)."""
    return torch.as_tensor(values).view(1, -1, 1, 1)


def card_statistics(card: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """The mean and std of a model's card, for pixels in [0, 1], each (1, C, 1, 1)."""
    return per_channel(card["mean"]).to(device), per_channel(card["std"]).to(device)


def resized(pixels: Tensor, size: tuple[int, int], model: nn.Module) -> Tensor:
    """Pixels (B, C, H, W) in [0, 1], resized to `size` (height, width) with the model's interpolation."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return F.interpolate(pixels, size, mode=interpolation(model), antialias=True).clamp(0, 1)


def interpolation(model: nn.Module) -> Literal["bilinear", "bicubic"]:
    """timm's interpolation for the model; bicubic if torch has no antialiased version of it."""
    return "bilinear" if resolve_model_data_config(model)["interpolation"] == "bilinear" else "bicubic"


def default_statistics(model: nn.Module) -> Statistics:
    """timm's (mean, std) for pixels in [0, 1]. The values of three colours are averaged for a greyscale model."""
    own, channels = resolve_model_data_config(model), input_channels(model)
    if len(own["mean"]) == channels:
        return own["mean"], own["std"]
    mean, std = ((sum(v) / len(v),) * channels for v in (own["mean"], own["std"]))
    return mean, std


def sensible_crop(crop_pct: float) -> float:
    """`crop_pct` limited to the range of `augment.crop_pct`, which timm's value for a few models exceeds."""
    return max(0.1, min(1.0, crop_pct))


def usual_size(name: str) -> tuple[int, int]:
    """timm's (height, width) in pixels for a model name; 224 by 224 if it has none."""
    cfg = timm.get_pretrained_cfg(name)
    return tuple(cfg.input_size[-2:]) if cfg else (224, 224)


def statistics(model: nn.Module, spec: Model, channels: int, where: str) -> Statistics:
    """The recipe's (mean, std) for pixels in [0, 1], one value per channel; timm's defaults if it sets none.

    Raises `UserError` for a wrong number of values.
    """
    mean, std = default_statistics(model)
    chosen = (spec.mean or mean, spec.std or std)
    for name, values in zip(("mean", "std"), chosen):
        if len(values) != channels:
            raise UserError(f"{where}.{name} has {len(values)} values, but data.channels is {channels}")
    return chosen


def input_doubt(mean: Sequence[float], std: Sequence[float]) -> str:
    """A warning if these statistics cannot be those of pixels in [0, 1], else ""."""
    wrong = max(*mean, *std) > 2
    return "mean and std must be for pixels in [0, 1]; divide values for pixels up to 255 by 255" if wrong else ""


def input_channels(model: nn.Module) -> int:
    """Channels of the model's input images."""
    own = getattr(model, "in_chans", None)
    if isinstance(own, int):
        return own
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)


def expect_unit_range(images: Tensor) -> None:
    """Raises `UserError` if float images are not pixels in [0, 1], as after a normalisation. Waits for the device.

    Up to 1 % of the values may lie outside, as after a bicubic resize.
    """
    if images.dtype == torch.uint8 or images.is_meta or isinstance(images, FakeTensor) or not images.numel():
        return
    values = images.detach().float()
    share = ((values < -0.02) | (values > 1.02)).double().mean().item()
    if share > 0.01:
        low, high = values.min().item(), values.max().item()
        fix = "They seem to be normalised already: leave that out, because each model gets its own mean and std here"
        if low >= 0 and high > 2:
            fix = "Divide them by 255, or pass them as uint8"
        raise UserError(
            f"`images` must be uint8, or float pixels in [0, 1]; {share:.0%} of these values lie outside, from {low:.2f} to "
            f"{high:.2f}. {fix}"
        )
