"""A weighted k-nearest-neighbour classifier on fixed features, beside the linear probe."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

AT_A_TIME = 2**24  # similarities held at once: 64 MiB in float32


def knn_predict(
    train_features: Tensor,
    train_targets: Tensor,
    features: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    classes: int,
    leave_one_out: bool = False,
) -> Tensor:
    """Votes of the `k` training images with the largest cosine similarity s, each of weight exp(s / temperature).

    Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, 2018; `k` and `temperature`
    as in DINO, 2021. train_features: (N, D), train_targets: (N,) in 0 .. classes - 1, features: (M, D), all on one
    device. Fewer than `k` training images all vote. leave_one_out: `features` are the training images' own, and no
    image votes for itself.

    Returns (M, classes) float32, not negative, the larger the likelier. Each row is divided by the weight of its
    nearest neighbour, so small temperatures neither overflow nor vanish; the order within a row is the same.
    The same input gives the same output. Raises ValueError for `k` or `temperature` not above 0, and without
    training images.
    """
    if k < 1 or temperature <= 0 or not len(train_features):
        raise ValueError(
            f"k={k}, temperature={temperature}, {len(train_features)} training images: all must be above 0"
        )
    k = min(k, len(train_features) - leave_one_out)
    known = F.normalize(train_features.float(), dim=1).T  # (D, N)
    scores = torch.zeros(len(features), classes, device=features.device)
    rows = max(1, AT_A_TIME // len(train_features))
    for place, (part, out) in enumerate(zip(features.split(rows), scores.split(rows))):
        similarity = F.normalize(part.float(), dim=1) @ known
        if leave_one_out:
            similarity.diagonal(place * rows).fill_(-torch.inf)
        similarity, neighbours = similarity.topk(k, dim=1)  # (B, k), largest first
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = train_targets[neighbours]
        for column in range(k):  # one vote a row at a time: adding all at once is not reproducible on a GPU
            out.scatter_add_(1, votes[:, column : column + 1], weights[:, column : column + 1])
    return scores
