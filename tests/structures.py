"""Weights with structure."""

from __future__ import annotations

import torch


def with_structure(tensor: torch.Tensor) -> torch.Tensor:
    """A random positive tensor of the same shape and rank one."""
    return torch.rand(len(tensor), *[1] * (tensor.ndim - 1)) * torch.rand(1, *tensor.shape[1:])
