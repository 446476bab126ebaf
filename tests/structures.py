"""Models as plain structures."""

from __future__ import annotations

import torch


def with_structure(tensor: torch.Tensor) -> torch.Tensor:
    """Positive, of the same shape; a matrix is a product of two vectors."""
    return torch.rand(len(tensor), *[1] * (tensor.ndim - 1)) * torch.rand(1, *tensor.shape[1:])
