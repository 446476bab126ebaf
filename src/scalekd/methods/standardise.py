"""Standardisation of a teacher's features by statistics of its first images, as `fm` uses it."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.common import parallel

from .hadamard import hadamard
from .shared import full_precision

Standardisation = Literal["phi-s", "channel", "none"]

FLOOR = 1e-3  # a channel's standard deviation counts as at least this part of the root mean square of all channels'


class Standardise(nn.Module):
    """Maps vectors of C channels to mean 0 and variance 1 over the images that were measured.

    - `channel`: `(x - mean) / std` of each channel. Channels that hardly vary are divided by more than their `std`, see
      `FLOOR`.
    - `phi-s`: `W (x - mean)` with `W = H U^T / (phi sqrt(C))`, PHI-S of arXiv:2410.01680. The covariance is `U L U^T`,
      `H` is a Hadamard matrix and `phi^2` the mean variance of a channel, `trace(L) / C`. `W` is a rotation with one
      factor, so it keeps the ratios of all distances. Every output channel has variance 1.
    - `none`: `x`.

    First call `observe` for each batch, then `freeze` once. Before that, `x` is only converted to float32. The
    statistics are buffers.

    Args:
        channels: C.
        kind: `phi-s`, `channel` or `none`.

    Raises:
        ValueError: `phi-s`, and no Hadamard matrix of that order is known.
    """

    mean: Tensor  # (C,)
    weight: Tensor  # (C, C) with `phi-s`, else (C,)

    def __init__(self, channels: int, kind: Standardisation) -> None:
        super().__init__()
        self.kind, self.channels = kind, channels
        self.sums: tuple[Tensor, ...] = ()  # number, sum, and sum of (outer) products of all vectors, in float64
        if kind == "none":
            return
        if kind == "phi-s" and hadamard(channels) is None:
            raise ValueError(
                f"no Hadamard matrix of order {channels}, the teacher's channels, is known here. Set standardise to 'channel'"
            )
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("weight", torch.eye(channels) if kind == "phi-s" else torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """`x`, `(..., C)`, standardised, in float32 or float64."""
        x = full_precision(x)
        if self.kind == "none":
            return x
        with torch.autocast(x.device.type, enabled=False):
            centred = x - self.mean
            return F.linear(centred, self.weight) if self.kind == "phi-s" else centred * self.weight

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Adds vectors `(..., C)` to the sums."""
        if self.kind == "none":
            return
        with torch.autocast(x.device.type, enabled=False):
            x = x.detach().flatten(0, -2).double()
            products = x.T @ x if self.kind == "phi-s" else x.square().sum(dim=0)
        new = (torch.full((1,), float(len(x)), dtype=x.dtype, device=x.device), x.sum(dim=0), products)
        self.sums = tuple(a + b for a, b in zip(self.sums, new)) if self.sums else new

    @torch.no_grad()
    def freeze(self) -> None:
        """Sets the statistics from all vectors that this and all other processes observed."""
        if self.kind == "none":
            return
        number, total, products = (parallel.sum_over_processes(part).cpu() for part in self.sums)
        self.sums = ()
        mean = total / number
        if self.kind == "phi-s":
            weight = isotropic(products / number - torch.outer(mean, mean))
        else:
            variance = (products / number - mean.square()).clamp_min(0)
            weight = variance.clamp_min(FLOOR**2 * variance.mean()).clamp_min(TINY).rsqrt()
        self.mean.copy_(mean)
        self.weight.copy_(weight)

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.kind}"


TINY = torch.finfo(torch.float32).tiny  # instead of the variance of a constant


def isotropic(covariance: Tensor) -> Tensor:
    """W of PHI-S for a covariance `(C, C)` in float64: `W @ covariance @ W.T` has ones on its diagonal.

    The signs of the eigenvectors are fixed by their largest entries, so that rounding does not choose them.
    """
    channels = len(covariance)
    _, vectors = torch.linalg.eigh(covariance)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    vectors = vectors * largest.sign()
    variance = (covariance.trace() / channels).clamp_min(TINY)
    rotation: Any = hadamard(channels)
    return rotation @ vectors.T / (channels * variance).sqrt()
