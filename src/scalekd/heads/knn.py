"""A weighted k-nearest-neighbour classifier on fixed features."""

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
    """Votes of the `k` training images with the largest cosine similarity s, weighted by exp(s / temperature).

    From Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, 2018, with `k` and
    `temperature` as in DINO, 2021.

    Args:
        train_features: (N, D), on the same device as the other tensors. If N < k, all images vote.
        train_targets: (N,), in 0 .. classes - 1; or sets of classes, (N, classes) of 0 and 1: a neighbour votes for each.
        features: (M, D).
        leave_one_out: `features` are `train_features`; no image votes for itself.

    Returns scores (M, classes), float32, not negative; larger is more likely. Each row is divided by the weight of its
    nearest neighbour, which prevents overflow and underflow at small temperatures and keeps the order within the row.
    With sets of classes it is divided by the weights of all neighbours: then rows can be compared, as mAP does.
    The result is deterministic. Raises ValueError if `k` or `temperature` is not above 0, or N is 0.
    """
    if k < 1 or temperature <= 0 or not len(train_features):
        raise ValueError(
            f"k={k}, temperature={temperature} and {len(train_features)} training images must all be above 0"
        )
    k = min(k, len(train_features) - leave_one_out)
    known = F.normalize(train_features.float(), dim=1).T  # (D, N)
    scores = torch.zeros(len(features), classes, device=features.device)
    rows = max(1, AT_A_TIME // len(train_features))
    for block, (part, out) in enumerate(zip(features.split(rows), scores.split(rows))):
        similarity = F.normalize(part.float(), dim=1) @ known
        if leave_one_out:
            similarity.diagonal(block * rows).fill_(-torch.inf)
        add_votes(out, similarity, train_targets, k, temperature)
    return scores


def add_votes(scores: Tensor, similarity: Tensor, targets: Tensor, k: int, temperature: float) -> None:
    """Adds the votes of the `k` most similar images, as in `knn_predict`, to `scores` (B, classes), which are 0.

    similarity: (B, N) float32. targets: as `train_targets`.
    """
    similarity, neighbours = similarity.topk(k, dim=1)  # (B, k), largest first
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    # one vote per row at a time: one scatter_add_ of all votes is not deterministic on a GPU
    for column, weight in zip(neighbours.T, weights.T):
        if targets.dim() == 2:
            scores += weight[:, None] * targets[column]
        else:
            scores.scatter_add_(1, targets[column][:, None], weight[:, None])
    if targets.dim() == 2:
        scores /= weights.sum(1, keepdim=True)
