from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from by_hand import check_gradients, check_half_precision, conv, randomised, resample, values, weights

from scalekd.methods.mgd import MGD


def by_numpy(method, stage, student, teacher, mask):
    p = weights(method)
    x = resample(values(student), teacher.shape[2:])
    if f"align.s{stage}.1.weight" in p:
        x = conv(x, p[f"align.s{stage}.1.weight"], p[f"align.s{stage}.1.bias"])
    x = conv(x * mask, p[f"generate.s{stage}.0.weight"], p[f"generate.s{stage}.0.bias"])
    x = conv(np.maximum(x, 0), p[f"generate.s{stage}.2.weight"], p[f"generate.s{stage}.2.bias"])
    return sum(((a - b) ** 2).sum() for a, b in zip(x, values(teacher))) / len(x)


@pytest.mark.parametrize(("mask", "shape"), [("position", (3, 1, 3, 2)), ("channel", (3, 12, 1, 1))])
def test_against_numpy(pair, mask, shape):
    method = randomised(MGD(pair.student, pair.teacher, mask=mask, mask_ratio=0.4, alpha=0.5))
    student, teacher, targets = pair.features()
    torch.manual_seed(7)
    kept = values(torch.rand(shape)) >= 0.4
    assert 0 < kept.mean() < 1
    torch.manual_seed(7)
    losses = method(student, teacher, targets)
    expected = 0.5 * by_numpy(method, 4, student.final, teacher.final, kept)
    assert list(losses) == ["s4"] and losses["s4"].item() == pytest.approx(expected, rel=1e-10)


def test_nothing_hidden(pair):
    method = randomised(MGD(pair.student, pair.teacher, mask_ratio=0.0, stages=(4, 1)))
    student, teacher, targets = pair.features()
    losses = method(student, teacher, targets)
    for stage, s, t in [(4, student.final, teacher.final), (1, student.maps[0], teacher.maps[0])]:
        expected = 7e-5 * by_numpy(method, stage, s, t, 1)
        assert losses[f"s{stage}"].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("mask", "dims"), [("position", (0, 2, 3)), ("channel", (0, 1))])
def test_share_of_masked_values(pair, mask, dims):
    method = MGD(pair.student, pair.teacher, mask=mask, mask_ratio=0.3)
    torch.manual_seed(0)
    hidden = method.masked(torch.ones(50, 20, 16, 16)) == 0
    assert hidden.double().mean().item() == pytest.approx(0.3, abs=0.03)
    others = tuple({0, 1, 2, 3} - set(dims))
    assert torch.equal(hidden.all(others), hidden.any(others))  # whole positions, or whole channels
    assert not torch.equal(method.masked(torch.ones(2, 20, 16, 16)), method.masked(torch.ones(2, 20, 16, 16)))


def test_channels_are_aligned_where_they_differ(pair):
    method = MGD(pair.student, pair.teacher, stages=(1, 2))
    assert [name for name, _ in method.align.named_parameters()] == ["s2.1.weight", "s2.1.bias"]


@pytest.mark.parametrize(("stages", "mask"), [((4,), "position"), ((1, 2, 3, 4), "channel")])
def test_gradients(pair, stages, mask):
    check_gradients(MGD(pair.student, pair.teacher, stages=stages, mask=mask), pair, stages)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair, dtype):
    check_half_precision(lambda: MGD(pair.student, pair.teacher, stages=(2, 4)), pair, dtype)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": (0,)}, "stages"),
        ({"alpha": -1.0}, "alpha"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"mask_ratio": -0.1}, "mask_ratio"),
        ({"mask": "pixel"}, "choose from 'position', 'channel'"),
    ],
)
def test_rejected_options(pair, options, message):
    with pytest.raises(ValueError, match=message):
        MGD(pair.student, pair.teacher, **options)


def test_maps_are_needed(pair):
    blind = dataclasses.replace(pair.teacher, model="blind", maps=(), final=None)
    with pytest.raises(ValueError, match="blind gives logits only"):
        MGD(pair.student, blind)
