"""Drawing images of rare classes more often, `data.class_balance`."""

from __future__ import annotations

from collections import Counter

import pytest

from scalekd.data.samplers import Mix, TrainSampler
from scalekd.data.targets import balancing_weights

TARGETS = [0] * 80 + [1] * 16 + [2] * 4


def drawn(balance: float, epochs: int = 20, **options) -> list[tuple[int, int]]:
    weights = balancing_weights(TARGETS, balance)
    return [key for batch in TrainSampler(100, 10, 0, 10 * epochs, weights=weights, **options) for key in batch]


@pytest.mark.parametrize("balance, shares", [(0.0, (80, 16, 4)), (0.5, (8.94, 4, 2)), (1.0, (1, 1, 1))])
def test_classes_are_drawn_in_proportion(balance, shares):
    counts = Counter(TARGETS[i] for _, i in drawn(balance))
    assert sum(counts.values()) == 2000
    for label, share in enumerate(shares):
        assert counts[label] == pytest.approx(2000 * share / sum(shares), rel=0.05)


def test_an_image_is_drawn_as_often_as_its_share_rounded_up_or_down():
    for epoch in range(5):
        keys = drawn(1.0)[100 * epoch : 100 * epoch + 100]
        counts = Counter(i for _, i in keys)
        assert all(counts[i] in (8, 9) for i in range(96, 100))  # 100 / 3 / 4 = 8.3
        assert all(counts[i] in (2, 3) for i in range(80, 96)) and max(counts[i] for i in range(80)) == 1


def test_every_draw_is_augmented_in_another_way():
    keys = drawn(1.0) + drawn(1.0, repeats=2)
    assert len(set(keys[:2000])) == 2000 and len(set(keys[2000:])) == 2000


def test_the_draws_do_not_depend_on_where_a_run_starts_or_on_processes():
    weights = balancing_weights(TARGETS, 0.7)
    whole = list(TrainSampler(100, 10, 5, 30, weights=weights))
    assert list(TrainSampler(100, 10, 5, 30, 17, weights=weights)) == whole[17:]
    parts = [list(TrainSampler(100, 10, 5, 30, rank=r, world=2, weights=weights)) for r in (0, 1)]
    assert [a + b for a, b in zip(*parts)] == whole


def test_unlabelled_images_are_drawn_as_they_are():
    weights = balancing_weights([0] * 9 + [1], 1.0)
    keys = [key for batch in TrainSampler(30, 10, 0, 40, mix=Mix(10, 5), weights=weights) for key in batch]
    counts = Counter(i for _, i in keys)
    assert counts[9] == 100 and {counts[i] for i in range(10, 30)} == {10}
    assert len(set(keys)) == len(keys)


def test_an_image_with_several_classes_counts_for_the_rarest():
    weights = balancing_weights([(0,), (0, 1), (0,), (0, 1, 2), ()], 1.0)
    assert weights == [1 / 4, 1 / 2, 1 / 4, 1, 1 / 4]
