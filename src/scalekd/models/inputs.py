"""The input a model expects: size, mean, std and interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from scalekd.common.errors import UserError

from . import mixer  # noqa: F401 - adds a name to timm's
from .options import Model

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, one value per channel


def scaled(images: Tensor) -> Tensor:
    """uint8 images to float32 pixels in [0, 1], same shape."""
    return images.float() / 255


def per_channel(values: Sequence[float] | Tensor) -> Tensor:
    """One value per channel, (C,), shaped to broadcast over images: (1, C, 1, 1)."""
    return torch.as_tensor(values).view(1, -1, 1, 1)


def resized(pixels: Tensor, size: tuple[int, int], model: nn.Module) -> Tensor:
    """pixels (B, C, H, W) in [0, 1] at `size`, with the interpolation that the model was trained with."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return F.interpolate(pixels, size, mode=interpolation(model), antialias=True).clamp(0, 1)


def interpolation(model: nn.Module) -> Literal["bilinear", "bicubic"]:
    """timm's for that model; bicubic where it names one that torch cannot do with antialiasing."""
    return "bilinear" if resolve_model_data_config(model)["interpolation"] == "bilinear" else "bicubic"


def default_statistics(model: nn.Module) -> Statistics:
    """timm's (mean, std) of the model's input for pixels in [0, 1]; those of three colours averaged for a grey model."""
    own, channels = resolve_model_data_config(model), input_channels(model)
    if len(own["mean"]) == channels:
        return own["mean"], own["std"]
    mean, std = ((sum(v) / len(v),) * channels for v in (own["mean"], own["std"]))
    return mean, std


def sensible_crop(crop_pct: float) -> float:
    """Within what `augment.crop_pct` may be; timm's own for a few models is not."""
    return max(0.1, min(1.0, crop_pct))


def usual_size(name: str) -> tuple[int, int]:
    """(height, width) in pixels that timm names for a model; 224 where it names none."""
    cfg = timm.get_pretrained_cfg(name)
    return tuple(cfg.input_size[-2:]) if cfg else (224, 224)


def statistics(model: nn.Module, spec: Model, channels: int, where: str) -> Statistics:
    """(mean, std) of the model's input for pixels in [0, 1], one value per channel: the recipe's, else timm's own."""
    mean, std = default_statistics(model)
    chosen = (spec.mean or mean, spec.std or std)
    for name, values in zip(("mean", "std"), chosen):
        if len(values) != channels:
            raise UserError(f"{where}.{name}: {len(values)} values for data.channels={channels}")
    return chosen


def input_doubt(mean: Sequence[float], std: Sequence[float]) -> str:
    """What is wrong with statistics that cannot be of pixels in [0, 1]; empty if nothing is."""
    wrong = max(*mean, *std) > 2
    return "They are for pixels in [0, 1]; divide those for pixels up to 255 by 255" if wrong else ""


def input_channels(model: nn.Module) -> int:
    own = getattr(model, "in_chans", None)
    if isinstance(own, int):
        return own
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
