"""Scores against a confusion matrix filled by hand; windows against the whole image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.data.batches import Batch
from scalekd.transfer.segmentation.scores import (
    classes_of,
    confusion_matrix,
    evaluate,
    make_inference,
    scores,
    sliding,
    table,
    whole,
    window_starts,
)

NAMES = ["wall", "floor", "sky", "sea"]
# by hand: 255 is not counted; class 2 is in the truth and never called; class 3 is in neither
TRUTH = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 255], [2, 0, 1, 255]])
CALLED = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 1, 3]])
MATRIX = [[3, 1, 0, 0], [1, 3, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]


def test_the_confusion_matrix_and_scores_by_hand():
    matrix = confusion_matrix(CALLED, TRUTH, 4)
    assert matrix.tolist() == MATRIX
    result = scores(matrix, NAMES)
    # IoU: wall 3 / (4 + 5 - 3), floor 3 / (4 + 5 - 3), sky 0 / 2; sea has none
    assert [r["iou"] for r in result["per_class"]] == pytest.approx([50, 50, 0, None])
    assert [r["accuracy"] for r in result["per_class"]] == pytest.approx([75, 75, 0, None])
    assert [r["pixels"] for r in result["per_class"]] == [4, 4, 2, 0]
    assert result["miou"] == pytest.approx(100 / 3)
    assert result["pixel_accuracy"] == pytest.approx(60) and result["mean_accuracy"] == pytest.approx(50)
    assert result["pixels"] == 10 and result["classes_counted"] == 3
    lines = table(result).splitlines()
    assert lines[2] == "| wall | 50.00 | 75.00 | 4 |" and lines[5] == "| sea | - | - | 0 |"
    assert lines[6] == "| mean of 3 | 33.33 | 50.00 | 10 |"


def test_a_class_that_is_only_called_counts_against_the_mean():
    result = scores(torch.tensor([[1, 1], [0, 0]]), ["a", "b"])
    assert [r["iou"] for r in result["per_class"]] == [50, 0] and result["miou"] == 25
    assert result["per_class"][1]["accuracy"] is None and result["mean_accuracy"] == 50


def test_the_best_and_the_worst():
    truth = torch.tensor([[0, 1, 2, 3]])
    best = scores(confusion_matrix(truth, truth, 4), NAMES)
    assert best["miou"] == best["pixel_accuracy"] == best["mean_accuracy"] == 100
    worst = scores(confusion_matrix(truth.roll(1), truth, 4), NAMES)
    assert worst["miou"] == worst["pixel_accuracy"] == worst["mean_accuracy"] == 0
    with pytest.raises(UserError, match="are ignored; use masks"):
        scores(confusion_matrix(truth, torch.full_like(truth, 255), 4), NAMES)


def test_it_agrees_with_numpy_on_random_masks():
    random = np.random.default_rng(0)
    truth, called = random.integers(0, 5, (2, 30, 40)), random.integers(0, 5, (2, 30, 40))
    truth[random.random(truth.shape) < 0.2] = 255
    result = scores(confusion_matrix(torch.tensor(called), torch.tensor(truth), 5), list("abcde"))
    kept = truth != 255
    ious = [
        100 * (kept & (truth == c) & (called == c)).sum() / (kept & ((truth == c) | (called == c))).sum()
        for c in range(5)
    ]
    assert [r["iou"] for r in result["per_class"]] == pytest.approx(ious)
    assert result["miou"] == pytest.approx(np.mean(ious))
    assert result["pixel_accuracy"] == pytest.approx(100 * (truth == called)[kept].mean())


# ---------------------------------------------------------------- make_inference


class Seen(nn.Module):
    """A 1x1 convolution that notes the sizes it was given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.sizes = nn.Conv2d(3, 4, 1), []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[-2:]))
        return self.conv(x)


@pytest.mark.parametrize("height, width", [(8, 8), (20, 20), (13, 29), (8, 9), (3, 5), (5, 21)])
def test_sliding_equals_whole_where_a_pixel_sees_itself_alone(height, width):
    model, x = Seen(), torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    out = sliding(model, x, crop=(8, 8), stride=(5, 5))
    assert set(model.sizes) == {(min(8, height), min(8, width))}
    torch.testing.assert_close(out, whole(model, x), rtol=1e-5, atol=1e-6)


def test_windows_cover_everything_and_are_averaged():
    # a model that answers with the place in its window: by hand, 10 pixels in windows at 0, 3 and 4
    class Place(nn.Module):
        def forward(self, x):
            return torch.arange(x.shape[-1]).float().expand(len(x), 1, x.shape[-2], -1)

    out = sliding(Place(), torch.zeros(1, 3, 6, 10), crop=(6, 6), stride=(6, 3))
    starts = [0, 3, 4]
    expected = [np.mean([p - s for s in starts if s <= p < s + 6]) for p in range(10)]
    assert out[0, 0].tolist() == [pytest.approx(expected)] * 6


@pytest.mark.parametrize(
    "length, expected", [(512, [0]), (300, [0]), (513, [0, 1]), (853, [0, 341]), (900, [0, 341, 388])]
)
def test_where_windows_start(length, expected):
    assert window_starts(length, 512, 341) == expected


def test_ways_of_inference():
    assert make_inference("whole", (8, 8)) is whole
    model, x = Seen(), torch.randn(1, 3, 20, 8)
    make_inference("sliding", (8, 8))(model, x)
    assert len(model.sizes) == len(window_starts(20, 8, 5)) == 4  # two thirds of 8
    assert 2 * 512 // 3 == 341  # the papers'
    with pytest.raises(UserError, match="must be whole or sliding"):
        make_inference("both", (8, 8))
    with pytest.raises(UserError, match="a stride from 1 to 8, not 9"):
        make_inference("sliding", (8, 8), (9, 9))(model, x)


def test_evaluation_at_the_masks_own_size():
    """Channel 0 of the pixels is the class; one image was enlarged, the other is as it was."""

    class Reads(nn.Module):
        def forward(self, x):
            return torch.stack([-((x[:, 0] - c) ** 2) for c in range(4)], 1)

    truth = torch.tensor([[[0, 1], [2, 3]]], dtype=torch.uint8)
    large = torch.cat([truth.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]] * 3, 1)
    wrong = torch.full((1, 3, 2, 2), 3, dtype=torch.uint8)
    mean, std = torch.zeros(1, 3, 1, 1), torch.full((1, 3, 1, 1), 1 / 255)
    model = Reads().train()
    for how in (whole, make_inference("sliding", (3, 3), (2, 2))):
        result = evaluate(model, [Batch(large, truth), Batch(wrong, truth)], mean, std, torch.device("cpu"), NAMES, how)
        # by hand: all of the first, the last pixel of the second
        assert result["pixel_accuracy"] == pytest.approx(100 * 5 / 8)
        assert [r["iou"] for r in result["per_class"]] == pytest.approx([50, 50, 50, 100 * 2 / 5])
    assert model.training


def test_the_sum_over_processes_is_taken_once(monkeypatch):
    summed = []
    monkeypatch.setattr(parallel, "sum_over_processes", lambda v: summed.append(v.clone()) or 2 * v)
    zeros = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    batches = [Batch(zeros, torch.zeros(1, 2, 2, dtype=torch.uint8))] * 3
    result = evaluate(Seen(), batches, torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1), torch.device("cpu"), NAMES)
    assert len(summed) == 1 and summed[0].sum() == 12 and result["pixels"] == 24


def test_a_few_classes_at_a_time_are_all_of_them():
    logits = torch.randn(2, 21, 7, 9, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.functional.interpolate(logits, (33, 20), mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(classes_of(logits, (33, 20)), whole)
    assert classes_of(torch.zeros(1, 10, 2, 2), (2, 2)).max() == 0  # the first of those that are alike


def test_classes_of_enlarges_before_it_decides():
    logits = torch.tensor([[[[2.0, 0.0]], [[0.0, 1.0]]]])  # (1, 2, 1, 2)
    assert classes_of(logits, (1, 2)).tolist() == [[[0, 1]]]
    # at 4 pixels, bilinear: class 0 has 2, 1.5, 0.5, 0 and class 1 has 0, 0.25, 0.75, 1
    assert classes_of(logits, (1, 4)).tolist() == [[[0, 0, 1, 1]]]
    assert not math.isnan(scores(torch.eye(2), ["a", "b"])["miou"])
