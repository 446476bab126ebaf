"""The k-nearest-neighbour classifier against one written as loops over images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from scalekd.heads import knn
from scalekd.heads.knn import knn_predict


def images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 7, generator=generator) + 0.3, torch.randint(4, (n,), generator=generator)


def by_loops(
    known: list[list[float]], labels: list[int], asked: list[list[float]], k: int, t: float
) -> list[list[float]]:
    """The share of each class in the votes, four classes."""

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b)) / (math.hypot(*a) * math.hypot(*b))

    rows = []
    for one in asked:
        nearest = sorted(((cosine(one, other), label) for other, label in zip(known, labels)), reverse=True)[:k]
        votes = [0.0] * 4
        for similarity, label in nearest:
            votes[label] += math.exp(similarity / t)
        rows.append([vote / sum(votes) for vote in votes])
    return rows


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 0.5), (60, 0.07)])
def test_votes_are_those_of_the_loops(k, temperature):
    (x, y), (asked, _) = images(60, seed=0), images(25, seed=1)
    votes = knn_predict(x, y, asked, k=k, temperature=temperature, classes=4)
    wanted = torch.tensor(by_loops(x.tolist(), y.tolist(), asked.tolist(), k, temperature))
    assert votes.shape == (25, 4) and votes.dtype == torch.float32
    assert (votes / votes.sum(1, keepdim=True) - wanted).abs().max() < 1e-5


def test_by_hand():
    # at 0, 60 and 90 degrees from what is asked, whatever their lengths: cosines 1, 1/2, 0
    x = torch.tensor([[2.0, 0.0], [0.5, 0.5 * math.sqrt(3)], [0.0, 7.0]])
    votes = knn_predict(x, torch.tensor([0, 2, 2]), torch.tensor([[3.0, 0.0]]), k=3, temperature=0.5, classes=4)
    assert votes[0].tolist() == pytest.approx([1, 0, math.exp(-1) + math.exp(-2), 0], rel=1e-5)


def test_chunks_and_order_change_nothing(monkeypatch):
    (x, y), (asked, _) = images(60, seed=0), images(25, seed=1)
    whole = knn_predict(x, y, asked, k=9, classes=4)
    assert torch.equal(knn_predict(x, y, asked, k=9, classes=4), whole)
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert (knn_predict(x[shuffled], y[shuffled], asked, k=9, classes=4) - whole).abs().max() < 1e-5
    monkeypatch.setattr(knn, "AT_A_TIME", 60 * 4)  # four rows at a time, one in the last part
    assert (knn_predict(x, y, asked, k=9, classes=4) - whole).abs().max() < 1e-5


def test_few_images_all_vote_and_a_small_temperature_stays_finite():
    (x, y), (asked, _) = images(5, seed=0), images(8, seed=1)
    votes = knn_predict(x, y, asked, k=20, classes=4)
    assert torch.equal(votes, knn_predict(x, y, asked, k=5, classes=4))
    assert (votes.sum(1) >= 1).all() and set(votes.sum(0).nonzero().flatten().tolist()) == set(y.tolist())
    cold = knn_predict(x.half(), y, asked.half(), temperature=1e-4, classes=4)
    nearest = (torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(asked, dim=1).T).argmax(0)
    assert cold.isfinite().all() and torch.equal(cold.argmax(1), y[nearest])


@pytest.mark.parametrize("options", [{"k": 0}, {"temperature": 0.0}, {"n": 0}])
def test_invalid_arguments_are_rejected(options):
    x, y = images(options.pop("n", 3), seed=0)
    with pytest.raises(ValueError, match="must all be above 0"):
        knn_predict(x, y, x, **options, classes=4)


def test_neighbours_vote_for_each_of_their_classes_and_rows_can_be_compared():
    generator = torch.Generator().manual_seed(0)
    known, asked = (torch.randn(n, 6, generator=generator) for n in (30, 9))
    truth = (torch.rand(30, 4, generator=generator) < 0.4).float()
    found = knn.knn_predict(known, truth, asked, k=5, temperature=0.2, classes=4)
    x, q, y = known.double().numpy(), asked.double().numpy(), truth.numpy()
    for row, one in zip(found.numpy(), q):
        similarity = x @ one / np.linalg.norm(x, axis=1) / np.linalg.norm(one)
        nearest = np.argsort(-similarity)[:5]
        weights = np.exp(similarity[nearest] / 0.2)
        np.testing.assert_allclose(row, weights @ y[nearest] / weights.sum(), rtol=1e-5)
