from __future__ import annotations

import numpy as np
import pytest
import torch
from by_hand import check_gradients, check_half_precision, resample, values

from scalekd.methods.mse import MSE
from scalekd.models.stages import Features, Shapes


def test_on_paper():
    """Errors of 1, 0, 2 and 3: their squares have the mean 3.5. The map after the norm, twice as large, if lifted."""
    shapes = Shapes("s", ((2, 1, 2),) * 4, (2, 1, 2), 0)
    teacher = Features(torch.empty(1, 0), (torch.zeros(1, 2, 1, 2),) * 4, torch.full((1, 2, 1, 2), 9.0))
    x = torch.tensor([1.0, 0.0, 2.0, -3.0]).reshape(1, 2, 1, 2)
    student = Features(torch.empty(1, 0), (7 * x, 7 * x, 7 * x, x), 2 * x)
    assert MSE(shapes, shapes, alpha=0.4)(student, teacher, torch.zeros(1))["mse"].item() == pytest.approx(0.4 * 3.5)
    lifted = MSE(shapes, shapes, lifted=True)(student, teacher, torch.zeros(1))
    assert lifted["mse"].item() == pytest.approx(0.2 * 4 * 3.5)


@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_against_numpy(pair, lifted, swapped):
    """The wider model is averaged over channels as the release does, the student's grid as everywhere in scalekd."""
    first, second, targets = pair.features()
    (student, teacher), shapes = (first, second), (pair.student, pair.teacher)
    if swapped:
        student, teacher, shapes = teacher, student, shapes[::-1]
    s, t = values(student.final if lifted else student.maps[3]), values(teacher.maps[3])
    s, width = resample(s, t.shape[2:]), min(s.shape[1], t.shape[1])
    s, t = (narrowed(x, width) for x in (s, t))
    loss = MSE(*shapes, lifted=lifted)(student, teacher, targets)["mse"]
    assert loss.item() == pytest.approx(0.2 * ((s - t) ** 2).mean(), rel=1e-9)


def narrowed(x, width):
    """Channel i of n is the mean of those from floor(i D / n) to ceil((i + 1) D / n)."""
    D = x.shape[1]
    return np.stack([x[:, i * D // width : -(-(i + 1) * D // width)].mean(1) for i in range(width)], 1)


@pytest.mark.parametrize("lifted", [False, True])
def test_gradients(pair, lifted):
    check_gradients(MSE(pair.student, pair.teacher, lifted=lifted), pair, (4,), raw=not lifted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair, dtype):
    check_half_precision(lambda: MSE(pair.student, pair.teacher), pair, dtype)


def test_rejected_alpha(pair):
    with pytest.raises(ValueError, match="alpha"):
        MSE(pair.student, pair.teacher, alpha=0.0)
