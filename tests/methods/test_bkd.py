from __future__ import annotations

import dataclasses
from math import log

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from scalekd.methods.bkd import BKD
from scalekd.models.stages import Features, Shapes

S3 = Shapes("s", (), None, 3)
STUDENT = Features(torch.tensor([[log(3), -log(4), 0.0]]))  # sigmoid: 3/4, 1/5, 1/2
INDEX = torch.tensor([0])


def cross_entropy(q: float, p: float) -> float:
    return -(q * log(p) + (1 - q) * log(1 - p))


def test_softmax_by_hand():
    teacher = Features(torch.tensor([[log(1), log(2), log(5)]]))  # softmax: 1/8, 2/8, 5/8
    expected = cross_entropy(1 / 8, 3 / 4) + cross_entropy(2 / 8, 1 / 5) + cross_entropy(5 / 8, 1 / 2)
    assert BKD(S3, S3)(STUDENT, teacher, INDEX)["bkd"].item() == pytest.approx(expected / 3, rel=1e-6)


def test_sigmoid_by_hand():
    teacher = Features(torch.tensor([[0.0, log(9), -log(3)]]))  # sigmoid: 1/2, 9/10, 1/4
    expected = cross_entropy(1 / 2, 3 / 4) + cross_entropy(9 / 10, 1 / 5) + cross_entropy(1 / 4, 1 / 2)
    loss = BKD(S3, S3, probabilities="sigmoid")(STUDENT, teacher, INDEX)["bkd"]
    assert loss.item() == pytest.approx(expected / 3, rel=1e-6)


@pytest.mark.parametrize(("probabilities", "of"), [("softmax", lambda t: softmax(t, axis=1)), ("sigmoid", expit)])
def test_gradient_is_the_difference_of_the_probabilities(pair, probabilities, of):
    """d/ds of the binary cross entropy is sigmoid(s) - q, over the number of terms that are averaged."""
    student, teacher, targets = pair.features()
    method = BKD(pair.student, pair.teacher, probabilities=probabilities)
    assert torch.autograd.gradcheck(lambda s: method(Features(s), teacher, targets)["bkd"], student.logits)
    method(student, teacher, targets)["bkd"].backward()
    s, t = student.logits.detach().numpy(), teacher.logits.detach().numpy()
    np.testing.assert_allclose(student.logits.grad.numpy(), (expit(s) - of(t)) / s.size, rtol=1e-10)
    assert teacher.logits.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pair, dtype):
    student = Features(torch.tensor([[6e4, -6e4, 1.0, 0.0, 2.0]], dtype=dtype, requires_grad=True))
    teacher = Features(torch.tensor([[-6e4, 6e4, 1.0, 0.0, 2.0]], dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = BKD(pair.student, pair.teacher)(student, teacher, INDEX)["bkd"]
    loss.backward()
    assert loss.dtype == torch.float32 and student.logits.grad.isfinite().all()
    large = float(torch.tensor(6e4, dtype=dtype))
    softplus = sum(np.log1p(np.exp([1.0, 0.0, 2.0])))  # the three others, whose q is 0
    assert loss.item() == pytest.approx((2 * large + softplus) / 5, rel=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda s: BKD(s, None), "bkd needs a teacher"),
        (lambda s: BKD(s, dataclasses.replace(s, classes=0)), "no classifier"),
        (lambda s: BKD(s, dataclasses.replace(s, model="other", classes=7)), "s has 3 classes and other 7"),
        (lambda s: BKD(s, s, probabilities="tanh"), "choose from 'softmax', 'sigmoid'"),
    ],
)
def test_rejected_options(build, message):
    with pytest.raises(ValueError, match=message):
        build(S3)
