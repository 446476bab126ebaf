"""Retrieval by embeddings: for each query, where the images of its class are in the order of similarity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .knn import add_votes

RANKS = (1, 5, 10)  # the k of recall@k
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the k-NN classifier, as in `knn_predict`
RETRIEVAL_FIGURES = {
    **{f"recall_at_{k}": f"recall@{k}" for k in RANKS},
    "map_at_r": "mAP@R",
    "knn": "k-NN",
}
AT_A_TIME = 2**23  # similarities held at once: 64 MiB in float64


def retrieval_scores(
    queries: Tensor,
    query_classes: Tensor,
    gallery: Tensor,
    gallery_classes: Tensor,
    itself: Tensor,
) -> dict[str, Tensor]:
    """How well each query finds the images of its class in a gallery, by cosine similarity.

    With the gallery in the order of similarity to a query that has R images of its class there (relevant ones):

        recall@k  1 if one of the first k images is relevant, else 0
        mAP@R     1/R * sum over i = 1..R of  (image i is relevant) * (share of relevant ones in the first i)

    mAP@R is from Musgrave et al., "A Metric Learning Reality Check", ECCV 2020 (arXiv:2003.08505, section 3.2). `knn` is 1
    if the vote of the 20 most similar images, as in `knn_predict`, gives the query's class.

    Images that are equally similar count in the worst order, those of other classes first, so a model that gives all
    images one vector scores 0. Similarities are computed in float64 and compared in float32: what one vector gives two
    equal images is then equal, and neither the order of the images nor the chunks matter.

    Args:
        queries: (M, D), of any length; on the device where it is computed.
        query_classes: (M,) int64.
        gallery: (N, D).
        gallery_classes: (N,) int64, with the numbers of `query_classes`.
        itself: (M,) int64, where each query is in the gallery, which it then must not find; -1 if it is not there.

    Returns:
        (M,) float64 for each key of `RETRIEVAL_FIGURES`, in [0, 1]; NaN for a query without a relevant image.
    """
    found = {key: torch.full((len(queries),), torch.nan, dtype=torch.float64) for key in RETRIEVAL_FIGURES}
    known = F.normalize(gallery.double(), dim=1).T  # (D, N)
    asked = F.normalize(queries.double(), dim=1)
    classes = int(max(query_classes.max(), gallery_classes.max())) + 1
    rows = max(1, AT_A_TIME // len(gallery))
    order = query_classes.argsort(stable=True)  # one class at a time, so that a chunk has one set of relevant images
    for label, of_class in zip(*_runs(query_classes[order], order)):
        relevant = gallery_classes == label
        for chunk in of_class.split(rows):
            similarity = (asked[chunk] @ known).float()
            own = itself[chunk]
            there = (own >= 0).nonzero().flatten()
            similarity[there, own[there]] = -torch.inf
            counted = relevant.sum() - (relevant[own.clamp(min=0)] & (own >= 0)).long()  # (B,), R
            scores = _ranked(similarity[:, relevant], similarity[:, ~relevant], counted)
            scores["knn"] = _voted(similarity, gallery_classes, classes) == label
            for key, values in scores.items():
                found[key][chunk.cpu()] = values.double().masked_fill(counted == 0, torch.nan).cpu()
    return found


def _runs(labels: Tensor, order: Tensor) -> tuple[list[int], Sequence[Tensor]]:
    """The values of sorted `labels`, and the part of `order` for each."""
    values, counts = labels.unique_consecutive(return_counts=True)
    return values.tolist(), order.split(counts.tolist())


def _ranked(relevant: Tensor, others: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """recall@k and mAP@R of B queries of one class.

    relevant: (B, n), similarities of the relevant images; -inf for the query itself. others: (B, N - n). counted: (B,),
    how many relevant images there are without the query.
    """
    width = relevant.shape[1]
    if not width:
        return {key: torch.zeros_like(counted, dtype=torch.float64) for key in RETRIEVAL_FIGURES if key != "knn"}
    near = relevant.sort(dim=1, descending=True).values
    # no more of the others can come before an image that counts
    most = min(others.shape[1], max(width, *RANKS))
    ahead = others.topk(most, dim=1).values.flip(1).contiguous()
    before = most - torch.searchsorted(ahead, near)  # of the j-th relevant image: others at least as similar
    place = torch.arange(1, width + 1, device=relevant.device)
    rank = before + place  # (B, n), from 1
    hits = (place <= counted[:, None]) & (rank <= counted[:, None])
    found = {f"recall_at_{k}": rank[:, 0] <= k for k in RANKS}
    precision = torch.where(hits, place / rank.double(), 0.0)
    found["map_at_r"] = precision.sum(1) / counted.clamp(min=1)
    return found


def _voted(similarity: Tensor, classes: Tensor, count: int) -> Tensor:
    """The class (B,) with the most votes of the nearest images. similarity: (B, N), -inf for the query itself."""
    votes = torch.zeros(len(similarity), count, device=similarity.device)
    add_votes(votes, similarity, classes, min(NEIGHBOURS, similarity.shape[1]), TEMPERATURE)
    return votes.argmax(1)


def figures_of_scores(scores: dict[str, Tensor]) -> dict[str, float]:
    """The figures in %, `queries`, which have a relevant image, and `left_out`, which have none.

    scores: of `retrieval_scores`. Without a query the figures are 0.
    """
    used = ~scores["map_at_r"].isnan()
    queries = int(used.sum())
    figures = {key: 100 * values[used].sum().item() / max(1, queries) for key, values in scores.items()}
    return figures | {"queries": queries, "left_out": len(used) - queries}


def without_relevant(query_classes: Sequence[Hashable]) -> int:
    """How many images that query each other have no other image of their class."""
    return sum(count == 1 for count in Counter(query_classes).values())
