"""The FLOP counter of `scalekd cost`, `scalekd pairs` and the reports."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


CPU_ATTENTION = {  # without these, some releases of PyTorch (such as 2.11 and 2.12) count no attention on a CPU
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


def flop_counter() -> FlopCounterMode:
    """PyTorch's `FlopCounterMode` that prints nothing and counts attention on a CPU in every release."""
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
