"""Linear centred kernel alignment of the stages of two models: Kornblith et al., "Similarity of Neural Network
Representations Revisited", ICML 2019, arXiv:1905.00414, mini-batch by mini-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 4  # images of a batch, for the unbiased estimate


class StageCKA:
    """CKA of every map of one model with every map of another, over batches.

    CKA(X, Y) = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)). Each HSIC is the unbiased estimate (Song et al., JMLR 2012)
    on the inner products of a batch's images, averaged over batches as in Nguyen et al., ICLR 2021, arXiv:2010.15327:
    so its expectation does not depend on the batch size. Batches must be random samples. An image's features are its
    whole map, flattened. 1: the same up to rotation and scale; 0: unrelated (an estimate may lie a little below).
    """

    def __init__(self) -> None:
        self.cross = self.rows = self.columns = torch.zeros(())
        self.images = 0

    def add(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        """Maps (B, D, H, W) of both models for the same images; a batch of fewer than 4 is left out."""
        n = len(a[0])
        if n < LEAST:
            return
        k, l = ([inner_products(maps) for maps in of_one] for of_one in (a, b))  # noqa: E741 - as in the paper
        self.cross = self.cross + n * torch.stack([torch.stack([hsic(x, y) for y in l]) for x in k])
        self.rows = self.rows + n * torch.stack([hsic(x, x) for x in k])
        self.columns = self.columns + n * torch.stack([hsic(y, y) for y in l])
        self.images += n

    def result(self) -> list[list[float | None]]:
        """A row for each map of the first model; None where a map does not vary, and without a batch an empty list."""
        if not self.images:
            return []
        scale = (self.rows[:, None].clamp(min=0) * self.columns.clamp(min=0)).sqrt()
        return [[float(c / s) if s > 0 else None for c, s in zip(*row)] for row in zip(self.cross, scale)]


def inner_products(maps: Tensor) -> Tensor:
    """(B, B), float64, of the flattened maps less their mean over the batch, which leaves `hsic` as it is."""
    flat = maps.float().flatten(1)
    flat = flat - flat.mean(0)
    return (flat @ flat.T).double()


def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """The unbiased estimate of the Hilbert-Schmidt independence criterion from two (n, n) kernel matrices, n >= 4."""
    n = len(k)
    k, l = k - k.diag().diag(), l - l.diag().diag()  # noqa: E741
    together = (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ l.sum(0))
    return together / (n * (n - 3))
