"""Models on the meta device, for their shapes and counts: their tensors have no values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# what initial values are made with: methods of tensors, and functions of torch.nn.init of the same or other names
FILLING = {
    "add_", "clamp_", "constant_", "erfinv_", "fill_", "kaiming_normal_", "kaiming_uniform_", "mul_", "normal_",
    "trunc_normal_", "uniform_", "xavier_normal_", "xavier_uniform_", "zero_", "zeros_",
}  # fmt: skip


class _Unfilled(TorchFunctionMode):
    """Returns tensors on the meta device as they are, where a model would fill them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in FILLING:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextmanager
def unfilled() -> Iterator[None]:
    """Models that are created inside have no memory and no initial values.

    `torch.device("meta")` alone gives the same models, but works out the shape of every step of their initialisation, in
    Python: for a Swin that takes longer than its forward pass.
    """
    with torch.device("meta"), _Unfilled():
        yield
