from __future__ import annotations

import dataclasses
from math import log

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from scalekd.methods.dkd import DKD
from scalekd.methods.logits import KD
from scalekd.models.stages import Features, Shapes

S3 = Shapes("s", (), None, 3)


def test_by_hand():
    student = Features(torch.tensor([[log(1), log(2), log(5)]]))  # softmax: 1/8, 2/8, 5/8
    teacher = Features(torch.tensor([[log(2), log(1), log(1)]]))  # 1/2, 1/4, 1/4
    losses = DKD(S3, S3)(student, teacher, torch.tensor([0]))
    # Target 1/2 against 1/8, all others 1/2 against 7/8.
    assert losses["tckd"].item() == pytest.approx(0.5 * log(4) + 0.5 * log(4 / 7), rel=1e-5)
    # Among the others: 1/2, 1/2 against 2/7, 5/7. beta is 2.
    assert losses["nckd"].item() == pytest.approx(2 * (0.5 * log(7 / 4) + 0.5 * log(7 / 10)), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_parts_add_up_to_kd(pair, temperature):
    """The paper's identity: KD = TCKD + (1 - the teacher's target probability) * NCKD, image by image."""
    student, teacher, targets = pair.features(batch=6)
    t = softmax(teacher.logits.detach().numpy() / temperature, axis=1)
    method = DKD(pair.student, pair.teacher, beta=1.0, temperature=temperature)
    kd = KD(pair.student, pair.teacher, temperature=temperature)
    for i, target in enumerate(targets.tolist()):
        batch = Features(student.logits[[i]]), Features(teacher.logits[[i]]), targets[[i]]
        parts = method(*batch)
        together = parts["tckd"].item() + (1 - t[i, target]) * parts["nckd"].item()
        assert together == pytest.approx(kd(*batch)["kd"].item(), rel=1e-10)


def test_against_scipy(pair):
    student, teacher, targets = pair.features(batch=6)
    losses = DKD(pair.student, pair.teacher, alpha=3.0, beta=0.5, temperature=2.0)(student, teacher, targets)
    tckd = nckd = 0.0
    for s, t, c in zip(student.logits.detach().numpy(), teacher.logits.detach().numpy(), targets.tolist(), strict=True):
        (bs, bt), (ns, nt) = zip(*(split(softmax(x / 2), c) for x in (s, t)), strict=True)
        tckd += rel_entr(bt, bs).sum() / 6
        nckd += rel_entr(nt, ns).sum() / 6
    assert losses["tckd"].item() == pytest.approx(3 * 4 * tckd, rel=1e-10)
    assert losses["nckd"].item() == pytest.approx(0.5 * 4 * nckd, rel=1e-10)


def split(p: np.ndarray, target: int) -> tuple[np.ndarray, np.ndarray]:
    others = np.delete(p, target)
    return np.array([p[target], others.sum()]), others / others.sum()


def test_a_mixed_label_counts_as_its_largest_share(pair):
    student, teacher, _ = pair.features(batch=2)
    mixed = torch.tensor([[0.1, 0.0, 0.6, 0.3, 0.0], [0.0, 0.7, 0.0, 0.0, 0.3]]).double()
    method = DKD(pair.student, pair.teacher)
    losses, expected = method(student, teacher, mixed), method(student, teacher, torch.tensor([2, 1]))
    others = method(student, teacher, torch.tensor([3, 4]))
    assert all(torch.equal(losses[k], expected[k]) and not torch.equal(losses[k], others[k]) for k in losses)


def test_gradient(pair):
    student, teacher, targets = pair.features()
    for options in ({}, {"alpha": 0.0}, {"beta": 0.0}, {"temperature": 3.0}):
        method = DKD(pair.student, pair.teacher, **options)
        assert torch.autograd.gradcheck(
            lambda s, m=method: tuple(m(Features(s), teacher, targets).values()), student.logits
        )
    sum(method(student, teacher, targets).values()).backward()
    assert teacher.logits.grad is None


def test_two_classes_have_no_others():
    two = dataclasses.replace(S3, classes=2)
    student, teacher = Features(torch.tensor([[0.0, 1.0]])), Features(torch.tensor([[2.0, 0.0]]))
    losses = DKD(two, two)(student, teacher, torch.tensor([1]))
    assert losses["nckd"] == 0
    torch.testing.assert_close(losses["tckd"], KD(two, two)(student, teacher, torch.tensor([1]))["kd"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_probabilities_of_zero(pair, dtype):
    student = Features(torch.tensor([[6e4, -6e4, 0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True))
    teacher = Features(torch.tensor([[-6e4, 6e4, 0.0, 0.0, 0.0]], dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        losses = DKD(pair.student, pair.teacher)(student, teacher, torch.tensor([1]))
    sum(losses.values()).backward()
    large = float(torch.tensor(6e4, dtype=dtype))
    # The teacher is sure of class 1, to which the student gives e^-2 large; of the others the teacher has the last
    # three alike, at a third each, and the student e^-large.
    assert losses["tckd"].dtype == torch.float32
    assert losses["tckd"].item() == pytest.approx(2 * large, rel=1e-6)
    assert losses["nckd"].item() == pytest.approx(2 * (large - log(3)), rel=1e-6)
    assert student.logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda s: DKD(s, None), "dkd needs a teacher"),
        (lambda s: DKD(s, dataclasses.replace(s, classes=0)), "no classifier"),
        (lambda s: DKD(s, dataclasses.replace(s, model="other", classes=7)), "s has 3 classes and other 7"),
        (lambda s: DKD(*[dataclasses.replace(s, classes=1)] * 2), "two classes"),
        (lambda s: DKD(s, s, alpha=-1.0), "alpha is -1.0"),
        (lambda s: DKD(s, s, alpha=0.0, beta=0.0), "one must be positive"),
        (lambda s: DKD(s, s, temperature=0.0), "temperature"),
    ],
)
def test_rejected_options(build, message):
    with pytest.raises(ValueError, match=message):
        build(S3)
