from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import softmax

from scalekd.methods.dist import DIST
from scalekd.models.stages import Features, Shapes

S2 = Shapes("s", (), None, 2)


@pytest.mark.parametrize(("beta", "gamma", "tau"), [(1.0, 1.0, 1.0), (2.0, 0.5, 4.0)])
def test_against_numpys_corrcoef(pair, beta, gamma, tau):
    student, teacher, targets = pair.features(batch=7)
    s, t = (softmax(f.logits.detach().numpy() / tau, axis=1) for f in (student, teacher))
    rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T, strict=True)])
    losses = DIST(pair.student, pair.teacher, beta=beta, gamma=gamma, tau=tau)(student, teacher, targets)
    assert losses["inter"].item() == pytest.approx(beta * tau**2 * rows, rel=1e-10)
    assert losses["intra"].item() == pytest.approx(gamma * tau**2 * columns, rel=1e-10)


def test_by_hand():
    """With two classes a row is (p, 1 - p), its correlation 1 or -1; three images agree on two. The columns of the
    student are 1/2 + (1, 0, -1)/10, of the teacher 1/2 + (1, -1, 0)/10: correlation 1 / (sqrt 2 sqrt 2)."""
    s, t = ([[0.6, 0.4], [0.49, 0.51], [0.4, 0.6]], [[0.7, 0.3], [0.2, 0.8], [0.9, 0.1]])
    features = [Features(torch.tensor(x).double().log()) for x in (s, t)]
    inter = DIST(S2, S2)(*features, torch.zeros(3))["inter"]
    assert inter.item() == pytest.approx((0 + 0 + 2) / 3)
    s, t = ([[0.6, 0.4], [0.5, 0.5], [0.4, 0.6]], [[0.6, 0.4], [0.4, 0.6], [0.5, 0.5]])
    features = [Features(torch.tensor(x).double().log()) for x in (s, t)]
    intra = DIST(S2, S2)(*features, torch.zeros(3))["intra"]
    assert intra.item() == pytest.approx(1 - 0.5)


def test_probabilities_need_not_be_met():
    """A student whose probabilities are half-way to even has the teacher's relations, and no loss."""
    t = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]]).double()
    three = dataclasses.replace(S2, classes=3)
    losses = DIST(three, three)(Features(((t + 1 / 3) / 2).log()), Features(t.log()), torch.zeros(4))
    assert all(abs(v.item()) < 1e-12 for v in losses.values())


def test_gradient(pair):
    student, teacher, targets = pair.features()
    method = DIST(pair.student, pair.teacher, tau=2.0)
    assert torch.autograd.gradcheck(lambda s: tuple(method(Features(s), teacher, targets).values()), student.logits)
    sum(method(student, teacher, targets).values()).backward()
    assert teacher.logits.grad is None


def test_a_student_with_even_logits_gets_no_gradient_rather_than_a_huge_one(pair):
    """As a timm Mixer, whose head starts at zero. Rounding gives its rows a length near 1e-9 at 1000 classes."""
    thousand = dataclasses.replace(S2, classes=1000)
    logits = torch.zeros(4, 1000, requires_grad=True)
    teacher = Features(torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)))
    losses = DIST(thousand, thousand)(Features(logits), teacher, torch.zeros(4))
    assert losses["inter"].item() == losses["intra"].item() == 1
    sum(losses.values()).backward()
    assert (logits.grad == 0).all()


def test_one_image_has_rows_but_no_columns(pair):
    student, teacher, targets = pair.features(batch=1)
    losses = DIST(pair.student, pair.teacher, gamma=0.5)(student, teacher, targets)
    assert losses["intra"].item() == 0.5
    (gradient,) = torch.autograd.grad(losses["intra"], student.logits, retain_graph=True)
    assert (gradient == 0).all()
    (gradient,) = torch.autograd.grad(losses["inter"], student.logits)
    assert gradient.isfinite().all() and (gradient != 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pair, dtype):
    student, teacher, targets = pair.features(batch=6, dtype=dtype)
    full = [Features(f.logits.detach().float()) for f in (student, teacher)]
    method = DIST(pair.student, pair.teacher)
    with torch.autocast("cpu", torch.bfloat16):
        losses = method(student, teacher, targets)
    for name, value in method(*full, targets).items():
        assert losses[name].dtype == torch.float32 and torch.equal(losses[name], value)
    extreme = torch.tensor([[6e4, -6e4, 0.0, 0.0, 0.0], [0.0] * 5], dtype=dtype, requires_grad=True)
    sum(method(Features(extreme), Features(extreme.detach().flip(1)), targets).values()).backward()
    assert extreme.grad.isfinite().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda s: DIST(s, None), "dist needs a teacher"),
        (lambda s: DIST(s, dataclasses.replace(s, classes=0)), "no classifier"),
        (lambda s: DIST(s, dataclasses.replace(s, model="other", classes=7)), "s has 2 classes and other 7"),
        (lambda s: DIST(*[dataclasses.replace(s, classes=1)] * 2), "two classes"),
        (lambda s: DIST(s, s, gamma=-1.0), "gamma is -1.0"),
        (lambda s: DIST(s, s, beta=0.0, gamma=0.0), "one must be positive"),
        (lambda s: DIST(s, s, tau=0.0), "tau"),
    ],
)
def test_rejected_options(build, message):
    with pytest.raises(ValueError, match=message):
        build(S2)
