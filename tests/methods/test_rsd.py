from __future__ import annotations

import numpy as np
import pytest
import torch
from by_hand import check_gradients, check_half_precision, randomised, values, weights
from scipy.special import erf

from scalekd.methods.rsd import RSD, standardized
from scalekd.models.stages import Features, Shapes


def test_terms_on_paper():
    """Two images, two channels. A channel that differs is +1 and -1 after standardisation; the student's second channel
    runs against the teacher's. P is ((1, -1), (1, -1)): the diagonal has the squares 0 and 4, the rest 1 and 1."""
    two = Shapes("s", ((2, 1, 1),) * 4, (2, 1, 1), 0)
    method = RSD(two, two, alpha=0.5, kappa=0.1)
    method.projector = torch.nn.Identity()
    student = Features(torch.empty(2, 0), (), torch.tensor([[9.0, 1.0], [5.0, 4.0]])[:, :, None, None])
    teacher = Features(torch.empty(2, 0), (), torch.tensor([[7.0, 3.0], [1.0, 2.0]])[:, :, None, None])
    losses = method(student, teacher, torch.zeros(2))
    assert losses["invariance"].item() == pytest.approx(0.5 * 4, rel=1e-4)
    assert losses["decorrelation"].item() == pytest.approx(0.5 * 0.1 * 2, rel=1e-4)


def test_a_channel_that_does_not_vary_is_zero():
    assert (standardized(torch.full((4, 2), 3.0)) == 0).all()


@pytest.mark.parametrize("options", [{}, {"alpha": 0.7, "kappa": 0.3, "expansion": 3}])
def test_against_numpy(pair, options):
    """The authors' code, cell by cell of the matrix."""
    method = randomised(RSD(pair.student, pair.teacher, **options))
    student, teacher, targets = pair.features(batch=6)
    p = weights(method)
    x = values(student.final).mean((2, 3)) @ p["projector.0.weight"].T
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * p["projector.1.weight"] + p["projector.1.bias"]
    x = x * (1 + erf(x / np.sqrt(2))) / 2 @ p["projector.3.weight"].T
    x, y = ((z - z.mean(0)) / (z.std(0) + 1e-5) for z in (x, values(teacher.final).mean((2, 3))))
    own = others = 0.0
    for i in range(y.shape[1]):
        for j in range(x.shape[1]):
            correlation = (y[:, i] * x[:, j]).mean()
            if i == j:
                own += (correlation - 1) ** 2
            else:
                others += correlation**2
    losses = method(student, teacher, targets)
    alpha, kappa = options.get("alpha", 0.1), options.get("kappa", 0.01)
    assert losses["invariance"].item() == pytest.approx(alpha * own, rel=1e-9)
    assert losses["decorrelation"].item() == pytest.approx(alpha * kappa * others, rel=1e-9)


def test_images_may_not_be_exchanged(pair):
    method = randomised(RSD(pair.student, pair.teacher))
    student, teacher, targets = pair.features(batch=6)
    before = method(student, teacher, targets)["invariance"].item()
    teacher.final = teacher.final.flip(0)
    assert abs(method(student, teacher, targets)["invariance"].item() - before) > 1e-3


def test_gradients(pair):
    check_gradients(RSD(pair.student, pair.teacher), pair, (4,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair, dtype):
    check_half_precision(lambda: RSD(pair.student, pair.teacher), pair, dtype)


@pytest.mark.parametrize(
    ("options", "message"), [({"alpha": 0.0}, "alpha"), ({"kappa": -0.1}, "kappa"), ({"expansion": 0}, "expansion")]
)
def test_rejected_options(pair, options, message):
    with pytest.raises(ValueError, match=message):
        RSD(pair.student, pair.teacher, **options)
