"""Holds the weights of a frozen model in half precision: `teacher.precision`.

Autocast keeps float32 weights and converts them at every pass. Here they are converted once, which takes half of the
memory and needs no conversion in a step. Inputs are converted, and results are what they would be otherwise: in float32,
or under autocast in the half precision of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .stages import Features, StageView

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
T = TypeVar("T", Tensor, Features)


def hold_in(view: StageView, precision: str) -> None:
    """Converts the view's model, in place, to `bf16` or `fp16`. It still takes normalised images in float32."""
    dtype = DTYPES[precision]
    view.model.to(dtype)
    view.model.register_forward_pre_hook(_converted)
    view.held, view.run = dtype, _Run(dtype)


def _converted(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs of a call of the whole model, in the precision of its weights."""
    dtype = next(model.parameters()).dtype
    return tuple(x.to(dtype) for x in inputs)


class _Run:
    """Runs a part of a model that is held in `dtype`. Gradients flow to the inputs."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, part: Callable[..., T], *inputs: Tensor | None) -> T:
        device = next(x.device.type for x in inputs if x is not None)
        under_autocast = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False):
            result = part(*(None if x is None else x.to(self.dtype) for x in inputs))
        return result if under_autocast else _in_float32(result)


def _in_float32(result: Any) -> Any:
    if isinstance(result, Features):
        fields = {name: _in_float32(value) for name, value in vars(result).items()}
        return Features(**fields)
    if isinstance(result, tuple):
        return tuple(map(_in_float32, result))
    return result.float() if isinstance(result, Tensor) else result
