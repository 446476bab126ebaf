from __future__ import annotations

import numpy as np
import pytest
import torch
from by_hand import (
    batch_norm,
    cells,
    check_gradients,
    check_half_precision,
    conv,
    randomised,
    resample,
    values,
    weights,
)

from scalekd.methods.reviewkd import ReviewKD, hierarchical_distance


def test_distance_on_paper():
    a, t = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]]), torch.zeros(1, 1, 2, 2)
    # full: (1 + 4 + 9 + 36) / 4 = 12.5; 1x1: 3^2 = 9 with weight 1/2
    assert hierarchical_distance(a, t).item() == pytest.approx((12.5 + 9 / 2) / 1.5)
    assert hierarchical_distance(a[..., :1, :1], t[..., :1, :1]).item() == 1.0  # one position: no other scale


def distance_by_numpy(a, t):
    """Both maps pooled, as the authors do, where the method pools their difference."""
    terms, weight = [(1.0, ((a - t) ** 2).mean())], 1.0
    for size in (4, 2, 1):
        if size < max(a.shape[2:]):
            weight /= 2
            grid = [min(size, n) for n in a.shape[2:]]
            terms.append((weight, ((cells(a, grid) - cells(t, grid)) ** 2).mean()))
    return sum(w * d for w, d in terms) / sum(w for w, _ in terms)


@pytest.mark.parametrize(("grid", "scales"), [((7, 7), 4), ((4, 4), 3), ((3, 2), 3), ((1, 6), 4), ((2, 1), 2)])
def test_distance_against_numpy(grid, scales, monkeypatch):
    a, t = torch.randn(2, 3, *grid, dtype=torch.float64), torch.randn(2, 3, *grid, dtype=torch.float64)
    pools = []
    pool = torch.nn.functional.adaptive_avg_pool2d
    monkeypatch.setattr(torch.nn.functional, "adaptive_avg_pool2d", lambda x, to: pools.append(to) or pool(x, to))
    assert hierarchical_distance(a, t).item() == pytest.approx(distance_by_numpy(values(a), values(t)), rel=1e-10)
    assert len(pools) == scales - 1


def nearest(x, grid):
    rows, columns = (np.arange(n) * old // n for n, old in zip(grid, x.shape[2:]))
    return x[:, :, rows][:, :, :, columns]


def by_numpy(method, maps, targets, stages):
    p, review, losses = weights(method), None, {}
    for stage in sorted(stages, reverse=True):
        name = f"fusions.s{stage}"
        x = conv(maps[stage], p[f"{name}.reduce.0.weight"])
        x = batch_norm(x, p[f"{name}.reduce.1.weight"], p[f"{name}.reduce.1.bias"])
        if review is not None:
            review = nearest(review, x.shape[2:])
            both = conv(np.concatenate([x, review], 1), p[f"{name}.weigh.weight"], p[f"{name}.weigh.bias"])
            own, later = (1 / (1 + np.exp(-both[:, i : i + 1])) for i in (0, 1))
            x = own * x + later * review
        review = x
        y = conv(resample(x, targets[stage].shape[2:]), p[f"{name}.expand.0.weight"])
        y = batch_norm(y, p[f"{name}.expand.1.weight"], p[f"{name}.expand.1.bias"])
        losses[f"s{stage}"] = 0.5 * distance_by_numpy(y, targets[stage])
    return losses


@pytest.mark.parametrize("stages", [(1, 2, 3, 4), (2, 4), (3,)])
def test_against_numpy(pair, stages):
    method = randomised(ReviewKD(pair.student, pair.teacher, stages=stages, alpha=0.5, width=5))
    student, teacher, targets = pair.features()
    s, t = ([values(x) for x in (f.logits, *f.maps[:3], f.final)] for f in (student, teacher))  # by stage
    losses, expected = method(student, teacher, targets), by_numpy(method, s, t, stages)
    assert list(losses) == list(expected)
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-9)


def test_a_stage_learns_from_those_before_it(pair):
    """The loss of stage 1 reaches stage 4's map; that of stage 4 reaches no other."""
    method = randomised(ReviewKD(pair.student, pair.teacher, width=5))
    student, teacher, targets = pair.features()
    losses = method(student, teacher, targets)
    assert torch.autograd.grad(losses["s1"], student.final, retain_graph=True)[0].abs().max() > 1e-6
    assert torch.autograd.grad(losses["s4"], student.maps[0], allow_unused=True)[0] is None


@pytest.mark.parametrize("stages", [(1, 2, 3, 4), (3,)])
def test_gradients(pair, stages):
    check_gradients(ReviewKD(pair.student, pair.teacher, stages=stages, width=6), pair, stages)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair, dtype):
    check_half_precision(lambda: ReviewKD(pair.student, pair.teacher), pair, dtype)


@pytest.mark.parametrize(
    ("options", "message"), [({"stages": (0, 1)}, "stages"), ({"alpha": 0.0}, "alpha"), ({"width": 0}, "width")]
)
def test_rejected_options(pair, options, message):
    with pytest.raises(ValueError, match=message):
        ReviewKD(pair.student, pair.teacher, **options)
