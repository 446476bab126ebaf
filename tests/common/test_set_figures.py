"""mAP and F1 of sets of labels against values by hand and against other ways to compute them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from labelled_sets import slow_average_precision

from scalekd.common.set_figures import (
    Scores,
    average_precision,
    best_threshold,
    class_table,
    counts_at,
    f1_of,
    figures_of,
    map_change,
    precision_influences,
)


def slow_f1(probabilities: np.ndarray, truth: np.ndarray, threshold: float) -> tuple[float, float]:
    """Macro F1 over the classes with images, and micro F1, as harmonic means of precision and recall."""

    def harmonic(found, true):
        hits = (found & true).sum()
        if not hits:
            return 0.0
        precision, recall = hits / found.sum(), hits / true.sum()
        return 2 * precision * recall / (precision + recall)

    found = probabilities >= threshold
    macro = [harmonic(found[:, c], truth[:, c]) for c in range(truth.shape[1]) if truth[:, c].any()]
    return float(np.mean(macro)), harmonic(found.ravel(), truth.ravel())


def made(seed: int, images: int = 60, classes: int = 5, digits: int = 1) -> Scores:
    """Random scores with many ties; the last class has no image."""
    random = np.random.default_rng(seed)
    truth = random.random((images, classes)) < np.linspace(0.5, 0.05, classes)
    truth[0], truth[:, -1] = True, False
    logits = (random.normal(size=truth.shape) * 2 + 1.5 * truth).round(digits).astype(np.float32)
    return Scores(torch.from_numpy(logits), torch.from_numpy(truth))


def test_average_precision_by_hand():
    scores = np.array([0.9, 0.8, 0.7, 0.6])
    assert average_precision(scores, np.array([True, False, True, False])) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(scores[[0, 0, 1, 1]], np.array([True, False, True, False])) == pytest.approx(1 / 2)
    assert average_precision(scores, np.array([False, False, False, True])) == pytest.approx(1 / 4)
    assert np.isnan(average_precision(scores, np.zeros(4, bool)))


@pytest.mark.parametrize("seed", range(5))
def test_map_is_that_of_another_implementation_whatever_the_order(seed):
    scores = made(seed)
    logits, truth = scores.logits.numpy(), scores.truth.numpy()
    expected = 100 * np.mean([slow_average_precision(logits[:, c], truth[:, c]) for c in range(4)])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    assert figures_of(scores)["map"] == pytest.approx(expected, rel=1e-12)
    assert figures_of(Scores(scores.logits[order], scores.truth[order])) == pytest.approx(figures_of(scores), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_f1_is_that_of_another_implementation_at_every_threshold(seed):
    scores = made(seed)
    thresholds = torch.arange(1, 100).double() / 100
    macro, micro = f1_of(counts_at(scores, thresholds))
    probabilities, truth = scores.logits.double().sigmoid().numpy(), scores.truth.numpy()
    expected = [slow_f1(probabilities, truth, t) for t in thresholds.tolist()]
    np.testing.assert_allclose(np.stack([macro, micro], 1), expected, rtol=1e-12)
    chosen = best_threshold(scores)
    assert slow_f1(probabilities, truth, chosen)[0] == pytest.approx(max(m for m, _ in expected))
    found = figures_of(scores)
    assert (found["f1_macro"], found["f1_micro"]) == pytest.approx(
        [100 * f for f in slow_f1(probabilities, truth, chosen)]
    )


def test_a_probability_at_the_threshold_counts_and_of_equal_thresholds_the_middle_is_chosen():
    scores = Scores(torch.tensor([[0.0], [-8.0], [8.0]]), torch.tensor([[True], [False], [True]]))
    assert figures_of(scores, 0.5)["f1_micro"] == 100 and figures_of(scores, 0.51)["f1_micro"] == pytest.approx(200 / 3)
    assert best_threshold(scores) == 0.26  # 0.01 to 0.5 separate them


def test_the_table_by_class():
    truth = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 1], [0, 0, 0]]).bool()
    logits = torch.tensor([[3.0, -9, -9], [2, -9, -2], [1, -9, -3], [-4, -9, -1]])
    rows = class_table(Scores(logits, truth), ["ant", "bee", "cat"], 0.5)
    assert [row["class"] for row in rows] == ["cat", "ant"]  # no image has bee; the worst first
    assert rows[1] == {
        "class": "ant",
        "images": 2,
        "ap": 100.0,
        "precision": pytest.approx(200 / 3),
        "recall": 100.0,
        "f1": pytest.approx(80),
    }
    assert (
        rows[0]["ap"] == pytest.approx(100 * (1 / 3 + 2 / 4) / 2)
        and rows[0]["precision"] is None
        and rows[0]["f1"] == 0
    )


def weighted_average_precision(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> float:
    """`slow_average_precision` with every image counted `weights` times."""
    area = recall = 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        found = weights * (scores >= threshold)
        hits = found[truth].sum()
        if found.sum():
            area += (hits / weights[truth].sum() - recall) * hits / found.sum()
            recall = hits / weights[truth].sum()
    return area


@pytest.mark.parametrize("digits", [0, 6])  # with many ties, and without
def test_influences_are_the_derivatives_in_the_weights(digits):
    scores, truth = (t.numpy()[:, 0] for t in made(1, digits=digits))
    found, step = precision_influences(scores, truth), 1e-6
    assert found.sum() == pytest.approx(0, abs=1e-12)
    for j in range(len(truth)):
        up, down = (np.where(np.arange(len(truth)) == j, 1 + s, 1.0) for s in (step, -step))
        slope = weighted_average_precision(scores, truth, up) - weighted_average_precision(scores, truth, down)
        assert found[j] == pytest.approx(slope / (2 * step), abs=1e-7)


def test_the_interval_of_a_change_in_map_is_that_of_a_bootstrap():
    random = np.random.default_rng(0)
    before = made(2, images=400, digits=6)
    noise = torch.from_numpy(random.normal(size=before.logits.shape).astype(np.float32))
    after = Scores(before.logits + 0.8 * noise, before.truth)
    change, half = map_change(after, before)
    draws = []
    for _ in range(300):
        rows = torch.from_numpy(random.integers(0, 400, 400))
        drawn = [Scores(s.logits[rows], s.truth[rows]) for s in (after, before)]
        draws.append(figures_of(drawn[0])["map"] - figures_of(drawn[1])["map"])
    assert change == pytest.approx(figures_of(after)["map"] - figures_of(before)["map"])
    assert half == pytest.approx(1.96 * np.std(draws), rel=0.15)
    assert map_change(before, before) == (0, 0)
