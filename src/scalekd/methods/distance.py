"""The feature distance of ScaleKD, which `fd` and the ScaleKD methods use."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .shared import full_precision

Reduction = Literal["mean", "sum"]

ALPHA = 0.14  # released ScaleKD configurations: 0.08 for the original view + 0.06 for the alternative view
REFERENCE_POSITIONS = 49  # the 7x7 grid for which ALPHA was chosen
EPS = 1e-6  # a vector shorter than this has no direction


def remove_direct(x: Tensor) -> Tensor:
    """phi of ScaleKD's eq. 2: removes the direct (zero-frequency) component of each channel of `(B, D, H, W)`.

    The paper uses DCT, zero at (0, 0), inverse DCT. All other basis functions of the DCT sum to zero over the grid, so
    this is exactly the map minus its spatial mean. The result is in float32 or float64.
    """
    x = full_precision(x)
    return x - x.mean(dim=(2, 3), keepdim=True)


def only_direct(x: Tensor) -> Tensor:
    """The direct component, which `remove_direct` removes: the spatial mean at every position, `(B, D, H, W)`."""
    return full_precision(x).mean(dim=(2, 3), keepdim=True).expand_as(x)


def normalized_distance(a: Tensor, t: Tensor, reduction: Reduction = "sum") -> Tensor:
    """Squared distance of two maps whose channel vectors are scaled to length 1 at each position.

    This is L of ScaleKD's eq. 1 as the authors' release computes it. It is computed as `2 - 2 cos`, without normalised
    copies, in float32 or float64 even under autocast. A vector shorter than 1e-6 is normalised to zero and gets no
    gradient.

    Args:
        a, t: maps `(B, D, H, W)`.
        reduction: `sum`: summed over positions and averaged over the batch, as in the release. A 16x16 grid gives about
            five times the value of a 7x7 grid. `mean`: 49 x the average over positions and batch. Equal to `sum` at
            7x7, so a weight chosen there is valid for any grid.

    Returns:
        A scalar.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, t = full_precision(a), full_precision(t)
        a_norm = torch.linalg.vector_norm(a, dim=1)  # (B, H, W)
        t_norm = torch.linalg.vector_norm(t, dim=1)
        a_zero, t_zero = a_norm < EPS, t_norm < EPS
        # The length of a zero vector is set to inf, so that its cosine and gradient are 0. Two divisions, because
        # the gradient of a product of lengths would be 0 * inf.
        cos = (a * t).sum(dim=1) / a_norm.masked_fill(a_zero, torch.inf)
        cos = cos / t_norm.masked_fill(t_zero, torch.inf)
        distance = (2 - 2 * cos) - a_zero.to(cos.dtype) - t_zero.to(cos.dtype)
        if reduction == "mean":
            return REFERENCE_POSITIONS * distance.mean()
        return distance.sum() / len(a)
