from __future__ import annotations

from math import ceil, floor

import numpy as np
import pytest
import torch
from by_hand import batch_norm, check_gradients, check_half_precision, conv, randomised, values, weights

from scalekd.methods.wkd_f import WKDF, gaussians
from scalekd.models.stages import Features, Shapes


def test_on_paper():
    """One channel, one cell of two positions. The student's (1, 3) has mean 2 and variance 2, the teacher's (0, 8) mean 4
    and variance 32: 2 * (2 - 4)^2 + (sqrt 2 - sqrt 32)^2 = 8 + 18, times 0.5."""
    shapes = Shapes("s", ((1, 1, 2),) * 4, (1, 1, 2), 0)
    method = WKDF(shapes, shapes, alpha=0.5)
    method.projectors["s4"] = torch.nn.Identity()
    student, teacher = (
        Features(torch.empty(1, 0), (), torch.tensor(x).reshape(1, 1, 1, 2)) for x in ([1.0, 3.0], [0.0, 8.0])
    )
    assert method(student, teacher, torch.zeros(1))["s4"].item() == pytest.approx(13, rel=1e-4)


def in_cells(x, grid):
    """Means and standard deviations cell by cell, as the authors' loops."""
    means, deviations = [], []
    for i in range(grid):
        for j in range(grid):
            rows, columns = (slice(floor(k * n / grid), ceil((k + 1) * n / grid)) for k, n in zip((i, j), x.shape[2:]))
            part = x[:, :, rows, columns].reshape(*x.shape[:2], -1)
            means.append(part.mean(2))
            deviations.append(np.sqrt(part.var(2, ddof=1) + 1e-5))
    return np.stack(means), np.stack(deviations)


@pytest.mark.parametrize(
    ("options", "grids"),
    [
        ({}, {4: 2}),
        ({"stages": (1, 3), "alpha": 0.3, "mean_weight": 0.5, "width": 5}, {1: 4, 3: 2}),
        ({"stages": (1,), "grid": 3, "relu": True}, {1: 3}),
    ],
)
def test_against_numpy(pair, options, grids):
    method = randomised(WKDF(pair.student, pair.teacher, **options))
    assert method.grids == grids
    student, teacher, targets = pair.features()
    p, losses = weights(method), method(student, teacher, targets)
    assert list(losses) == [f"s{stage}" for stage in grids]
    for stage, grid in grids.items():
        x, y = (values(f.final if stage == 4 else f.maps[stage - 1]) for f in (student, teacher))
        name = f"projectors.s{stage}"
        x = conv(x, p[f"{name}.0.weight"], p[f"{name}.0.bias"])
        x = conv(x, p[f"{name}.1.weight"])
        x = batch_norm(conv(x, p[f"{name}.2.weight"]), p[f"{name}.3.weight"], p[f"{name}.3.bias"])
        x = np.maximum(x, 0) if options.get("relu") else x
        (m, d), (n, e) = in_cells(x, grid), in_cells(y, grid)
        total = options.get("mean_weight", 2.0) * ((m - n) ** 2).sum() + ((d - e) ** 2).sum()
        expected = options.get("alpha", 0.02) * total / (grid**2 * len(x))
        assert losses[f"s{stage}"].item() == pytest.approx(expected, rel=1e-9)


def test_equal_statistics_have_no_distance():
    """Positions may be exchanged within a cell, but not between cells."""
    x = torch.randn(2, 3, 4, 4)
    inside = x.reshape(2, 3, 2, 2, 2, 2).flip(3).reshape(x.shape)
    for a, b in zip(gaussians(x, 2), gaussians(inside, 2)):
        torch.testing.assert_close(a, b)
    assert (gaussians(x, 2)[0] - gaussians(x.flip(2), 2)[0]).abs().max() > 0.1


def test_gradients(pair):
    check_gradients(WKDF(pair.student, pair.teacher, stages=(2, 4), width=6), pair, (2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair, dtype):
    check_half_precision(lambda: WKDF(pair.student, pair.teacher), pair, dtype)


def test_a_map_of_one_position_is_told():
    one = Shapes("tiny", ((4, 8, 8), (4, 4, 4), (4, 2, 2), (4, 1, 1)), (4, 1, 1), 0)
    with pytest.raises(ValueError, match=r"tiny's map of stage 4 is 1x1 .* larger data\.image_size"):
        WKDF(one, one)
    with pytest.raises(ValueError, match=r"stage 2 is 4x4 for 4x4 cells; set a smaller grid"):
        WKDF(one, one, stages=(2,), grid=4)
    assert WKDF(one, one, stages=(2,)).grids == {2: 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": (5,)}, "stages"),
        ({"alpha": 0.0}, "alpha"),
        ({"mean_weight": 0.0}, "mean_weight"),
        ({"grid": 0}, "grid"),
        ({"width": 0}, "width"),
    ],
)
def test_rejected_options(pair, options, message):
    with pytest.raises(ValueError, match=message):
        WKDF(pair.student, pair.teacher, **options)
