"""Computes the similarity of the stages of two models: linear centred kernel alignment (CKA) over mini-batches.

Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, arXiv:1905.00414.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 4  # images of a batch, for the unbiased estimate


class StageCKA:
    """CKA of every map of one model with every map of another, over batches.

    CKA(X, Y) = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)). HSIC is estimated without bias (Song et al., JMLR 2012) from
    the inner products of a batch's images and averaged over batches (Nguyen et al., ICLR 2021, arXiv:2010.15327), so its
    expectation does not depend on the batch size. Batches must be random samples. The features of an image are its
    whole map, flattened. 1: equal up to rotation and scale. 0: unrelated; an estimate may be slightly below 0.
    """

    def __init__(self) -> None:
        self.cross = self.rows = self.columns = torch.zeros(())
        self.images = 0

    def add(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        """Adds the maps (B, D, H, W) of both models for the same images. A batch of fewer than 4 images is skipped."""
        n = len(a[0])
        if n < LEAST:
            return
        k, l = ([inner_products(maps) for maps in stages] for stages in (a, b))  # noqa: E741 - as in the paper
        self.cross = self.cross + n * torch.stack([torch.stack([hsic(x, y) for y in l]) for x in k])
        self.rows = self.rows + n * torch.stack([hsic(x, x) for x in k])
        self.columns = self.columns + n * torch.stack([hsic(y, y) for y in l])
        self.images += n

    def result(self) -> list[list[float | None]]:
        """A row for each map of the first model; None if a map does not vary. An empty list without batches."""
        if not self.images:
            return []
        scale = (self.rows[:, None].clamp(min=0) * self.columns.clamp(min=0)).sqrt()
        return [[float(c / s) if s > 0 else None for c, s in zip(*row)] for row in zip(self.cross, scale)]


def inner_products(maps: Tensor) -> Tensor:
    """Inner products (B, B), float64, of flattened maps minus their mean over the batch, which does not change `hsic`."""
    flat = maps.float().flatten(1)
    flat = flat - flat.mean(0)
    return (flat @ flat.T).double()


def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """The unbiased estimate of the Hilbert-Schmidt independence criterion of two (n, n) kernel matrices, n >= 4.

    Song et al., "Feature Selection via Dependence Maximization", JMLR 2012.
    """
    n = len(k)
    k, l = k - k.diag().diag(), l - l.diag().diag()  # noqa: E741
    together = (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ l.sum(0))
    return together / (n * (n - 3))
