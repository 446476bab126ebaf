from __future__ import annotations

import dataclasses
from math import log

import numpy as np
import pytest
import torch
from by_hand import batch_norm, check_gradients, check_half_precision, conv, randomised, values, weights
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import entropy

from scalekd.methods.ofa import OFA, target_enhanced


def logits_of(*shares: float) -> torch.Tensor:
    return torch.tensor([[log(x) for x in shares]], dtype=torch.float64)


def test_on_paper():
    student, teacher = logits_of(2, 1, 1), logits_of(1, 2, 1)  # 1/2, 1/4, 1/4 and 1/4, 1/2, 1/4
    # epsilon 1: -(1/4 log 1/2 + 1/2 log 1/4 + 1/4 log 1/4) = 7/4 log 2, whatever the target
    for target in range(3):
        loss = target_enhanced(student, teacher, torch.tensor([target]), 1.0)
        assert loss.item() == pytest.approx(1.75 * log(2))
    # epsilon 2, target 1: weights 1/16, (3/2)^2 - 1 = 5/4, 1/16
    loss = target_enhanced(student, teacher, torch.tensor([1]), 2.0)
    assert loss.item() == pytest.approx((1 / 16 + 2 * 5 / 4 + 2 / 16) * log(2))


def test_epsilon_1_is_kd_but_for_the_teachers_entropy(pair):
    student, teacher, targets = pair.features()
    loss = OFA(pair.student, pair.teacher).double()(student, teacher, targets)["logits"]
    s, t = softmax(values(student.logits), axis=1), softmax(values(teacher.logits), axis=1)
    expected = rel_entr(t, s).sum(1).mean() + entropy(t, axis=1).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def by_numpy(p, name, x, halvings):
    """A branch, layer by layer."""
    if halvings == 0:
        x = conv(x, p[f"{name}.0.weight"], p[f"{name}.0.bias"])
    for i in range(2 * halvings):
        depthwise, pointwise, norm = (f"{name}.{4 * i + k}" for k in range(3))
        x = conv(x, p[f"{depthwise}.weight"], stride=1 if i % 2 else 2, depthwise=True)
        x = conv(x, p[f"{pointwise}.weight"])
        x = np.maximum(batch_norm(x, p[f"{norm}.weight"], p[f"{norm}.bias"]), 0)
    last = max(int(key.split(".")[2]) for key in p if key.startswith(f"{name}."))
    return x.mean((2, 3)) @ p[f"{name}.{last}.weight"].T + p[f"{name}.{last}.bias"]


def test_against_numpy(pair):
    epsilon = (1.0, 1.25, 1.5, 2.0, 0.5)
    method = randomised(OFA(pair.student, pair.teacher, epsilon=epsilon))
    student, teacher, targets = pair.features()
    losses = method(student, teacher, targets)
    assert list(losses) == ["s1", "s2", "s3", "s4", "logits"]
    p = weights(method)
    maps = [values(x) for x in (*student.maps[:3], student.final)]
    logits = [by_numpy(p, f"branches.s{i}", x, 4 - i) for i, x in enumerate(maps, start=1)]
    t = softmax(values(teacher.logits), axis=1)
    for x, e, loss in zip([*logits, values(student.logits)], epsilon, losses.values()):
        log_s, expected = log_softmax(x, axis=1), 0.0
        for i, target in enumerate(targets.tolist()):
            for j in range(x.shape[1]):
                weight = (1 + t[i, j]) ** e - 1 if j == target else t[i, j] ** e
                expected -= weight * log_s[i, j] / len(x)
        assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_the_target_of_mixed_labels_is_the_larger_share():
    student, teacher = torch.randn(2, 4), torch.randn(2, 4)
    mixed = torch.tensor([[0.3, 0.0, 0.7, 0.0], [0.0, 0.6, 0.0, 0.4]])
    expected = target_enhanced(student, teacher, torch.tensor([2, 1]), 1.5)
    wrong = target_enhanced(student, teacher, torch.tensor([0, 3]), 1.5)
    assert torch.equal(target_enhanced(student, teacher, mixed.argmax(1), 1.5), expected) and expected != wrong


def test_mixed_labels_in_a_batch(pair):
    student, teacher, targets = pair.features()
    method = OFA(pair.student, pair.teacher, epsilon=(1.5,)).double()
    mixed = 0.6 * torch.eye(5)[targets] + 0.4 * torch.eye(5)[(targets + 1) % 5]
    for name, value in method(student, teacher, mixed).items():
        torch.testing.assert_close(value, method(student, teacher, targets)[name])


def test_widths(pair):
    """Doubled at each halving; the last one has the wider of the final maps, here the teacher's 12."""
    method = OFA(pair.student, pair.teacher)
    convolutions = [m for m in method.branches["s1"] if isinstance(m, torch.nn.Conv2d) and m.groups == 1]
    assert [m.out_channels for m in convolutions] == [4, 8, 8, 16, 16, 12]
    wide = dataclasses.replace(pair.student, final=(20, 2, 3))
    assert OFA(wide, pair.teacher).branches["s3"][-1].in_features == 20


@pytest.mark.parametrize("stages", [(1, 2, 3, 4), (4, 2)])
def test_gradients(pair, stages):
    check_gradients(OFA(pair.student, pair.teacher, stages=stages, epsilon=(1.5,)), pair, stages, logits=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair, dtype):
    check_half_precision(lambda: OFA(pair.student, pair.teacher, epsilon=(1.5,)), pair, dtype)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": (1, 1)}, "stages"),
        ({"epsilon": ()}, "one positive number, or 5"),
        ({"epsilon": (1.0, 1.0)}, "one positive number, or 5"),
        ({"epsilon": (0.0,)}, "one positive number"),
        ({"stages": (4,), "epsilon": (1.0, 1.0, 1.0)}, "one positive number, or 2"),
    ],
)
def test_rejected_options(pair, options, message):
    with pytest.raises(ValueError, match=message):
        OFA(pair.student, pair.teacher, **options)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (5, 6, "student has 5 classes and teacher 6"),
        (0, 0, "the teacher teacher has no classifier"),
        (0, 5, "student has 0 classes and teacher 5"),
    ],
)
def test_classes(pair, student, teacher, message):
    models = [dataclasses.replace(m, classes=n) for m, n in ((pair.student, student), (pair.teacher, teacher))]
    with pytest.raises(ValueError, match=message):
        OFA(*models)
