from __future__ import annotations

import numpy as np
import pytest
import torch
from by_hand import batch_norm, check_gradients, check_half_precision, conv, randomised, resample, values, weights
from scipy.stats import norm

from scalekd.methods.ofd import OFD, margin_relu, partial_distance


def test_distance_on_paper():
    # s, t: both positive; t positive alone; s above a negative t; s below a negative t (free); t zero, s below (free)
    s = torch.tensor([2.0, -1.0, 0.5, -3.0, -1.0]).view(1, 5, 1, 1)
    t = torch.tensor([1.0, 1.0, -0.5, -0.5, 0.0]).view(1, 5, 1, 1)
    assert partial_distance(s, t).item() == 1 + 4 + 1
    assert partial_distance(s.expand(3, 5, 1, 1), t.expand(3, 5, 1, 1)).item() == 6  # averaged over the batch


def test_margin_on_paper():
    t = torch.tensor([[[[-1.0, 2.0]], [[3.0, 4.0]]], [[[-3.0, 5.0]], [[0.0, 1.0]]]])  # (2, 2, 1, 2)
    expected = torch.tensor([[[[-1.0, 2.0]], [[3.0, 4.0]]], [[[-2.0, 5.0]], [[0.0, 1.0]]]])  # margins -2 and none
    assert torch.equal(margin_relu(t), expected)


def test_margin_is_the_papers_where_a_batch_norm_gave_the_map():
    """Its formula from the shift and scale of a BatchNorm, for values that are normal."""
    mean, std = np.array([0.5, -0.3, 0.0]), np.array([1.0, 2.0, 0.5])
    density, share = norm.pdf(mean / std), norm.cdf(-mean / std)
    expected = mean - std * density / share
    torch.manual_seed(0)
    t = torch.randn(200, 3, 32, 32, dtype=torch.float64) * torch.tensor(std).view(3, 1, 1)
    t += torch.tensor(mean).view(3, 1, 1)
    np.testing.assert_allclose(values(margin_relu(t)).min((0, 2, 3)), expected, rtol=0.01)


def test_against_numpy(pair):
    method = randomised(OFD(pair.student, pair.teacher, alpha=0.8))
    student, teacher, targets = pair.features()
    losses = method(student, teacher, targets)
    p = weights(method)
    maps = zip((*student.maps[:3], student.final), (*teacher.maps[:3], teacher.final), (0.1, 0.2, 0.4, 0.8))
    for stage, (s, t, weight) in enumerate(maps, start=1):
        s, t = resample(values(s), t.shape[2:]), values(t)
        s = conv(s, p[f"regressors.s{stage}.1.weight"])
        s = batch_norm(s, p[f"regressors.s{stage}.2.weight"], p[f"regressors.s{stage}.2.bias"])
        expected = 0.0
        for channel in range(t.shape[1]):
            margin = t[:, channel][t[:, channel] < 0].mean()
            for a, b in zip(s[:, channel].flat, np.maximum(t[:, channel], margin).flat):
                expected += 0 if a <= b <= 0 else (a - b) ** 2
        assert losses[f"s{stage}"].item() == pytest.approx(weight * expected / len(t), rel=1e-9)
    assert list(losses) == ["s1", "s2", "s3", "s4"]


def test_weights_are_the_stages_own(pair):
    assert OFD(pair.student, pair.teacher, stages=(3, 1), alpha=0.8).weights == {3: 0.4, 1: 0.1}


def test_a_relu_teacher_has_no_margin(pair):
    _, teacher, _ = pair.features()
    assert torch.equal(margin_relu(teacher.final.relu()), teacher.final.relu())


@pytest.mark.parametrize("stages", [(1, 2, 3, 4), (4,)])
def test_gradients(pair, stages):
    check_gradients(OFD(pair.student, pair.teacher, stages=stages, alpha=0.1), pair, stages)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair, dtype):
    check_half_precision(lambda: OFD(pair.student, pair.teacher), pair, dtype)


@pytest.mark.parametrize(("options", "message"), [({"stages": ()}, "stages"), ({"alpha": 0.0}, "alpha")])
def test_rejected_options(pair, options, message):
    with pytest.raises(ValueError, match=message):
        OFD(pair.student, pair.teacher, **options)
