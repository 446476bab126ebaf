from __future__ import annotations

import dataclasses
from math import log

import numpy as np
import pytest
import torch
from by_hand import check_half_precision
from scipy.special import rel_entr, softmax

from scalekd.methods.logits import KD, Asymmetric, BinaryCrossEntropy, CrossEntropy, standardized
from scalekd.methods.names import METHODS
from scalekd.models.stages import Features, Shapes

S3 = Shapes("s", (), None, 3)
PROBABILITIES = Features(torch.tensor([[log(1), log(2), log(5)]]))  # softmax: 1/8, 2/8, 5/8
SIGMOIDS = Features(torch.tensor([[log(3), -log(4), 0.0]]))  # sigmoid: 3/4, 1/5, 1/2


@pytest.mark.parametrize(
    ("smoothing", "targets", "expected"),
    [
        (0.0, torch.tensor([2]), -log(5 / 8)),
        (0.3, torch.tensor([2]), -(0.1 * log(1 / 8) + 0.1 * log(2 / 8) + 0.8 * log(5 / 8))),
        (0.0, torch.tensor([[0.5, 0.5, 0.0]]), -(0.5 * log(1 / 8) + 0.5 * log(2 / 8))),
        (0.3, torch.tensor([[0.5, 0.5, 0.0]]), -(0.45 * log(1 / 8) + 0.45 * log(2 / 8) + 0.1 * log(5 / 8))),
    ],
)
def test_ce_by_hand(smoothing, targets, expected):
    loss = CrossEntropy(S3, smoothing=smoothing)(PROBABILITIES, None, targets)
    assert loss["ce"].item() == pytest.approx(expected, rel=1e-6)


def test_ce_is_averaged_over_the_batch():
    logits = torch.tensor([[log(1), log(3)], [log(1), log(1)]])
    loss = CrossEntropy(S3)(Features(logits), None, torch.tensor([0, 1]))
    assert loss["ce"].item() == pytest.approx((log(4) + log(2)) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("smoothing", "targets", "per_class"),
    [
        (0.0, torch.tensor([0]), [-log(3 / 4), -log(4 / 5), -log(1 / 2)]),
        (
            0.3,
            torch.tensor([0]),
            [-(0.8 * log(3 / 4) + 0.2 * log(1 / 4)), -(0.1 * log(1 / 5) + 0.9 * log(4 / 5)), -log(1 / 2)],
        ),
        (
            0.0,
            torch.tensor([[0.4, 0.6, 0.0]]),
            [-(0.4 * log(3 / 4) + 0.6 * log(1 / 4)), -(0.6 * log(1 / 5) + 0.4 * log(4 / 5)), -log(1 / 2)],
        ),
    ],
)
def test_bce_by_hand(smoothing, targets, per_class):
    mean = BinaryCrossEntropy(S3, smoothing=smoothing)(SIGMOIDS, None, targets)
    total = BinaryCrossEntropy(S3, smoothing=smoothing, reduction="sum")(SIGMOIDS, None, targets)
    assert mean["bce"].item() == pytest.approx(sum(per_class) / 3, rel=1e-6)
    assert total["bce"].item() == pytest.approx(sum(per_class), rel=1e-6)


def test_bce_sum_is_averaged_over_the_batch():
    twice = Features(SIGMOIDS.logits.repeat(2, 1))
    method = BinaryCrossEntropy(S3, reduction="sum")
    one, two = method(SIGMOIDS, None, torch.tensor([1])), method(twice, None, torch.tensor([1, 1]))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_against_scipy(pair, temperature):
    student, teacher, targets = pair.features(batch=7)
    s = softmax(student.logits.detach().numpy() / temperature, axis=1)
    t = softmax(teacher.logits.detach().numpy() / temperature, axis=1)
    expected = temperature**2 * rel_entr(t, s).sum(axis=1).mean()
    loss = KD(pair.student, pair.teacher, temperature=temperature)(student, teacher, targets)["kd"]
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-12)


def test_kd_default_temperature_is_1(pair):
    batch = pair.features()
    default, one = KD(pair.student, pair.teacher), KD(pair.student, pair.teacher, temperature=1.0)
    assert torch.equal(default(*batch)["kd"], one(*batch)["kd"])


def test_kd_gradient(pair):
    student, teacher, targets = pair.features()
    method = KD(pair.student, pair.teacher, temperature=2.0)

    def loss(logits):
        return method(Features(logits), teacher, targets)["kd"]

    assert torch.autograd.gradcheck(loss, student.logits)
    loss(student.logits).backward()
    assert teacher.logits.grad is None


def z_score(logits):
    return (logits - logits.mean(axis=1, keepdims=True)) / logits.std(axis=1, ddof=1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_standardised_kd_against_scipy(pair, temperature):
    student, teacher, targets = pair.features(batch=7)
    s, t = (softmax(z_score(f.logits.detach().numpy()) / temperature, axis=1) for f in (student, teacher))
    method = KD(pair.student, pair.teacher, temperature=temperature, standardize=True)
    loss = method(student, teacher, targets)["kd"]
    np.testing.assert_allclose(loss.item(), temperature**2 * rel_entr(t, s).sum(axis=1).mean(), rtol=1e-12)
    moved = Features(3 * student.logits + 5), Features(0.1 * teacher.logits - 2)
    torch.testing.assert_close(method(*moved, targets)["kd"], loss)  # range and offset do not matter


def test_standardised_logits_on_paper():
    """(0, 2, 4): mean 2, squares 4 + 0 + 4 over 2, so standard deviation 2."""
    torch.testing.assert_close(standardized(torch.tensor([[0.0, 2.0, 4.0]])), torch.tensor([[-1.0, 0.0, 1.0]]))


def test_even_logits_get_no_standardised_gradient():
    """As those of a timm Mixer at its first step, whose head is zero."""
    logits = torch.zeros(2, 3, requires_grad=True)
    loss = KD(S3, S3, standardize=True)(Features(logits), Features(torch.randn(2, 3)), torch.tensor([0, 1]))["kd"]
    loss.backward()
    assert loss.isfinite() and (logits.grad == 0).all()


@pytest.mark.parametrize("variant", ["ttm", "wttm"])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_transformed_teacher_against_numpy(pair, variant, temperature):
    """The power transform of the teacher's probabilities, as the authors write it."""
    student, teacher, targets = pair.features(batch=7)
    s, p = (softmax(f.logits.detach().numpy(), axis=1) for f in (student, teacher))
    powers = p ** (1 / temperature)
    sums = powers.sum(axis=1)
    each = rel_entr(powers / sums[:, None], s).sum(axis=1)
    loss = KD(pair.student, pair.teacher, temperature=temperature, variant=variant)(student, teacher, targets)["kd"]
    expected = (each * sums).mean() if variant == "wttm" else each.mean()
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-12)


def test_weighted_transformed_teacher_on_paper():
    """Teacher (1/4, 1/4, 1/4, 1/4) and (1, 0, 0, 0), T 2: the roots sum to 2 and to 1. An even student has the
    divergence 0 from the first and log 4 from the second, of weight 1."""
    four = dataclasses.replace(S3, classes=4)
    teacher = torch.tensor([[0.0] * 4, [200.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    method = KD(four, four, temperature=2.0, variant="wttm")
    even = method(Features(torch.zeros(2, 4).double()), Features(teacher), torch.zeros(2))["kd"]
    assert even.item() == pytest.approx(log(4) / 2, rel=1e-9)
    sure = torch.tensor([[log(3), 0.0, 0.0, 0.0]] * 2).double()  # (1/2, 1/6, 1/6, 1/6)
    first, second = 0.25 * (log(0.25 / 0.5) + 3 * log(0.25 * 6)), log(2)
    loss = method(Features(sure), Features(teacher), torch.zeros(2))["kd"]
    assert loss.item() == pytest.approx((2 * first + second) / 2, rel=1e-9)


@pytest.mark.parametrize("options", [{"standardize": True}, {"variant": "wttm", "temperature": 3.0}])
def test_gradients_of_the_variants(pair, options):
    student, teacher, targets = pair.features()
    method = KD(pair.student, pair.teacher, **options)
    assert torch.autograd.gradcheck(lambda s: method(Features(s), teacher, targets)["kd"], student.logits)
    method(student, teacher, targets)["kd"].backward()
    assert teacher.logits.grad is None


@pytest.mark.parametrize("options", [{"standardize": True}, {"variant": "wttm", "temperature": 3.0}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_the_variants(pair, options, dtype):
    check_half_precision(lambda: KD(pair.student, pair.teacher, **options), pair, dtype)


@pytest.mark.parametrize("name", ["ce", "bce", "kd"])
@pytest.mark.parametrize("autocast", [True, False])
def test_float32_for_half_precision_logits(pair, name, autocast):
    student, teacher, targets = pair.features(dtype=torch.bfloat16)
    full = [Features(f.logits.float()) for f in (student, teacher)]
    method = METHODS[name](pair.student, pair.teacher)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = method(student, teacher, targets)[name]
    assert loss.dtype == torch.float32
    assert torch.equal(loss, method(*full, targets)[name])


def test_large_logits_stay_finite():
    student = Features(torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True))
    teacher = Features(torch.tensor([[-1e4, 1e4, 0.0]]))
    loss = KD(S3, S3)(student, teacher, torch.tensor([0]))["kd"]
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert student.logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda s: CrossEntropy(dataclasses.replace(s, classes=0)), "no classes"),
        (lambda s: BinaryCrossEntropy(dataclasses.replace(s, classes=0)), "no classes"),
        (lambda s: CrossEntropy(s, smoothing=1.0), "smoothing"),
        (lambda s: BinaryCrossEntropy(s, smoothing=-0.1), "smoothing"),
        (lambda s: BinaryCrossEntropy(s, reduction="none"), "reduction"),
        (lambda s: KD(s, None), "needs a teacher"),
        (lambda s: KD(s, dataclasses.replace(s, classes=0)), "no classifier"),
        (lambda s: KD(s, dataclasses.replace(s, model="other", classes=7)), "s has 3 classes and other 7"),
        (lambda s: KD(s, s, temperature=0.0), "temperature"),
        (lambda s: KD(s, s, variant="wtm"), "choose from 'kd', 'ttm', 'wttm'"),
        (lambda s: KD(s, s, variant="ttm"), "ttm is plain kd at temperature 1"),
        (lambda s: KD(s, s, variant="wttm", temperature=2.0, standardize=True), "use one of them"),
        (lambda s: KD(s, s, probabilities="sigmoid", standardize=True), "probabilities is sigmoid"),
        (lambda s: KD(s, s, probabilities="sigmoid", variant="ttm", temperature=2.0), "probabilities is sigmoid"),
        (lambda s: KD(*[dataclasses.replace(s, classes=1)] * 2, standardize=True), "two classes"),
    ],
)
def test_rejected_options(build, message):
    with pytest.raises(ValueError, match=message):
        build(S3)


@pytest.mark.parametrize("targets", [torch.tensor([[1.0, 0, 1]]), torch.tensor([[0.0, 1, 0]])])
def test_asl_by_hand(targets):
    options = {"gamma_neg": 3.0, "gamma_pos": 2.0, "clip": 0.1}
    expected = 0.0
    for p, y in zip((3 / 4, 1 / 5, 1 / 2), targets[0].tolist()):
        q = max(p - 0.1, 0)
        expected += -((1 - p) ** 2) * log(p) if y else -(q**3) * log(1 - q)
    mean = Asymmetric(S3, **options)(SIGMOIDS, None, targets)
    total = Asymmetric(S3, **options, reduction="sum")(SIGMOIDS, None, targets)
    assert mean["asl"].item() == pytest.approx(expected / 3, rel=1e-5)
    assert total["asl"].item() == pytest.approx(expected, rel=1e-5)


def test_asl_without_focus_is_bce_and_ignores_what_the_student_rules_out():
    targets = torch.tensor([[1.0, 0, 0]])
    plain = Asymmetric(S3, gamma_neg=0.0, gamma_pos=0.0, clip=0.0)(SIGMOIDS, None, targets)["asl"]
    assert plain.item() == pytest.approx(BinaryCrossEntropy(S3)(SIGMOIDS, None, targets)["bce"].item(), rel=1e-6)
    logits = torch.tensor([[1.0, -4.0, 2.0]], requires_grad=True)  # sigmoid(-4) is 0.018, below clip
    Asymmetric(S3)(Features(logits), None, targets)["asl"].backward()
    assert logits.grad is not None and logits.grad[0, 1] == 0 and (logits.grad[0, [0, 2]] != 0).all()


@pytest.mark.parametrize("options", [{"gamma_neg": -1.0}, {"clip": 1.0}, {"reduction": "none"}])
def test_asl_options_out_of_range(options):
    with pytest.raises(ValueError, match="asl"):
        Asymmetric(S3, **options)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kd_of_yes_and_no_is_the_mean_of_binary_divergences(temperature):
    s, t = torch.tensor([[2.0, -1.0, 30.0], [0.5, 0.0, -3.0]]), torch.tensor([[-1.0, 0.5, 9.0], [0.5, 4.0, -200.0]])
    method = KD(S3, S3, temperature=temperature, probabilities="sigmoid")
    p, q = (1 / (1 + np.exp(-x.double().numpy() / temperature)) for x in (t, s))
    expected = temperature**2 * (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).mean()
    assert method(Features(s), Features(t), torch.tensor([0, 1]))["kd"].item() == pytest.approx(expected, rel=1e-5)
    assert method(Features(s), Features(s), torch.tensor([0, 1]))["kd"].item() == 0
