"""recall@k, mAP@R and k-NN of embeddings against a ranking in numpy, one query at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from scalekd.heads import retrieval
from scalekd.heads.retrieval import RETRIEVAL_FIGURES, figures_of_scores, retrieval_scores, without_relevant


def by_query(queries: Tensor, classes: Tensor, gallery: Tensor, known: Tensor, itself: Tensor) -> dict[str, np.ndarray]:
    """Sorts the gallery of each query by (similarity, another class first) and reads the figures off the list."""
    x, g = (a.double().numpy() / np.linalg.norm(a.double().numpy(), axis=1, keepdims=True) for a in (queries, gallery))
    found: dict[str, list[float]] = {key: [] for key in RETRIEVAL_FIGURES}
    for i, label in enumerate(classes.tolist()):
        near = (g @ x[i]).astype(np.float32)
        kept = [j for j in range(len(g)) if j != int(itself[i])]
        same = known.numpy() == label
        order = sorted(kept, key=lambda j: (-near[j], same[j]))
        hits = np.array([same[j] for j in order], dtype=float)
        r = int(hits.sum())
        for k in (1, 5, 10):
            found[f"recall_at_{k}"].append(float(hits[:k].any()) if r else np.nan)
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        found["map_at_r"].append((precision * hits)[:r].sum() / r if r else np.nan)
        votes: dict[int, float] = {}
        for j in sorted(kept, key=lambda j: -near[j])[:20]:
            votes[int(known[j])] = votes.get(int(known[j]), 0.0) + np.exp(near[j] / 0.07)
        found["knn"].append(float(max(votes, key=lambda c: votes[c]) == label) if r else np.nan)
    return {key: np.array(values) for key, values in found.items()}


def clusters(n: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    centres = torch.randn(classes, 6, generator=torch.Generator().manual_seed(9))
    return centres[y] + torch.randn(n, 6, generator=generator), y


def agree(*inputs: Tensor) -> dict[str, Tensor]:
    scores, wanted = retrieval_scores(*inputs), by_query(*inputs)
    assert scores.keys() == wanted.keys() == RETRIEVAL_FIGURES.keys()
    for key, values in scores.items():
        np.testing.assert_allclose(values.numpy(), wanted[key], rtol=0, atol=1e-12, err_msg=key)
    return scores


@pytest.mark.parametrize("n, classes", [(60, 3), (40, 25), (9, 2)])
def test_images_query_each_other(n, classes):
    """Among 25 classes of 40 images some have one image."""
    x, y = clusters(n, classes, seed=0)
    scores = agree(x, y, x, y, torch.arange(n))
    figures = figures_of_scores(scores)
    alone = sum(int((y == label).sum()) == 1 for label in y.unique())
    assert figures["left_out"] == alone == without_relevant(y.tolist()) and figures["queries"] == n - alone
    assert (alone > 0) == (classes == 25)
    used = ~torch.isnan(scores["map_at_r"])
    assert figures["map_at_r"] == pytest.approx(100 * scores["map_at_r"][used].mean().item())
    assert n < 20 or 0 < figures["recall_at_1"] < figures["recall_at_10"] <= 100


def test_a_gallery_that_has_some_of_the_queries_and_not_all_classes():
    (x, y), (g, known) = clusters(30, 6, seed=0), clusters(50, 4, seed=1)
    itself = torch.full((30,), -1)
    itself[:4] = torch.arange(50, 54)
    g, known = torch.cat([g, x[:4]]), torch.cat([known, y[:4]])
    known[52] = (known[52] + 1) % 6  # the same image with another label
    scores = agree(x, y, g, known, itself)
    assert torch.isnan(scores["map_at_r"]).any()


def test_by_hand():
    """Angles to the query at 0 degrees: 10 (same), 20 (other), 30 (same), 40 (other), 50 (same); R is 3."""
    degrees = torch.deg2rad(torch.tensor([0.0, 10, 20, 30, 40, 50]).double())
    x, y = torch.stack([degrees.cos(), degrees.sin()], 1), torch.tensor([0, 0, 1, 0, 1, 0])
    scores = retrieval_scores(3 * x[:1], y[:1], x, y, torch.tensor([0]))
    assert scores["map_at_r"].item() == pytest.approx((1 + 2 / 3) / 3)  # the third relevant image is fifth
    assert scores["recall_at_1"].item() == 1
    later = retrieval_scores(x[:1], y[:1], x[[0, 2, 3]], y[[0, 2, 3]], torch.tensor([0]))
    assert [later[key].item() for key in ("recall_at_1", "recall_at_5", "map_at_r")] == [0, 1, 0]


def test_equally_similar_images_count_in_the_worst_order():
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    figures = figures_of_scores(retrieval_scores(*[torch.ones(6, 4), y] * 2, torch.arange(6)))
    assert figures["recall_at_1"] == figures["map_at_r"] == 0 and figures["recall_at_5"] == 100
    # two pairs of equal vectors, one of each class: the copy of the other class comes first
    x = torch.tensor([[1.0, 0.2], [1.0, 0.2], [0.1, 1.0], [0.1, 1.0], [0.9, 0.1]])
    agree(x, y[[0, 2, 0, 2, 0]], x, y[[0, 2, 0, 2, 0]], torch.arange(5))
    many = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).repeat(3, 1)  # every image three times
    labels = torch.randint(4, (120,), generator=torch.Generator().manual_seed(1))
    agree(many, labels, many, labels, torch.arange(120))


def test_neither_the_order_nor_the_chunks_matter(monkeypatch):
    x, y = clusters(80, 5, seed=3)
    x = torch.cat([x, x[:20]])
    y = torch.cat([y, (y[:20] + 1) % 5])  # equal vectors of two classes
    whole = retrieval_scores(x, y, x, y, torch.arange(100))
    monkeypatch.setattr(retrieval, "AT_A_TIME", 100 * 3)
    shuffled = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    parts = retrieval_scores(x[shuffled], y[shuffled], x[shuffled], y[shuffled], torch.arange(100))
    for key in ("recall_at_1", "recall_at_5", "recall_at_10", "map_at_r"):
        assert torch.equal(parts[key], whole[key][shuffled]), key
