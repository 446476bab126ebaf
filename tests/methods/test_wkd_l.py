from __future__ import annotations

import dataclasses
from math import exp, log

import numpy as np
import pytest
import torch
from by_hand import check_half_precision, values
from scipy.optimize import linprog
from scipy.special import log_softmax, softmax

from scalekd.methods.wkd_l import WKDL, class_rows, costs, transport
from scalekd.models.stages import Shapes


def test_costs_on_paper():
    """Rows in the directions 0, 60 and 180 degrees, of any length: cosines 1/2, -1 and -1/2."""
    rows = torch.tensor([[2.0, 0.0], [0.5, 0.75**0.5], [-5.0, 0.0]])
    expected = [[0, 0.5, 2], [0.5, 0, 1.5], [2, 1.5, 0]]
    expected = [[1 - exp(-2 * far) for far in row] for row in expected]
    torch.testing.assert_close(costs(rows, 2.0), torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_the_rows_are_those_of_the_classifier(pair):
    _, teacher, _ = pair.features()
    torch.testing.assert_close(class_rows(teacher), pair.classifier.weight)


def exact(s, t, cost):
    """The transport problem without entropy, by linear programming."""
    n = len(s)
    rows = np.kron(np.eye(n), np.ones((1, n)))
    columns = np.kron(np.ones((1, n)), np.eye(n))
    return linprog(cost.flatten(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([s, t])).fun


def test_with_little_entropy_it_is_the_optimal_transport():
    generator = np.random.default_rng(0)
    s, t = softmax(generator.normal(size=(2, 4, 6)), axis=2)
    cost = costs(torch.from_numpy(generator.normal(size=(6, 3))), 0.3)
    start = torch.full((4, 6), 1 / 6).double()
    found = transport(torch.from_numpy(s), torch.from_numpy(t), start, cost, 0.015, iterations=3000)
    for i in range(4):
        assert found[i].item() == pytest.approx(exact(s[i], t[i], cost.numpy()), rel=0.02)


def as_released(student, teacher, targets, rows, gamma, temperature, sharpness, regularization, iterations):
    """The authors' code in numpy: image by image, the target class cut out of probabilities and costs."""
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    distance = 1 - np.exp(-sharpness * (1 - rows @ rows.T))
    certain, moved = [], []
    for s, t, target in zip(student, teacher, targets, strict=True):
        certain.append(-softmax(t)[target] * log_softmax(s)[target])
        kept = [c for c in range(len(s)) if c != target]
        a, b = softmax(s[kept] / temperature), softmax(t[kept] / temperature)
        cost = np.maximum(distance[np.ix_(kept, kept)], 0) + 1e-8
        kernel = np.exp(-cost / regularization)
        u = np.full(len(kept), 1 / len(kept))
        for _ in range(iterations):
            v = b / (kernel.T @ u + 1e-8)
            u = a / (kernel @ v + 1e-8)
        moved.append((u[:, None] * kernel * v[None] * cost).sum())
    return np.mean(certain), gamma * np.mean(moved)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gamma": 2.0, "temperature": 4.0, "sharpness": 3.0, "regularization": 0.2, "iterations": 3},
        {"iterations": 1},
    ],
)
def test_against_the_released_code(pair, options):
    student, teacher, targets = pair.features(batch=7)
    everything = {"gamma": 30.0, "temperature": 2.0, "sharpness": 1.0, "regularization": 0.05, "iterations": 10}
    logits = [values(f.logits) for f in (student, teacher)]
    expected = as_released(*logits, targets.tolist(), values(pair.classifier.weight), **everything | options)
    losses = WKDL(pair.student, pair.teacher, **options)(student, teacher, targets)
    assert losses["target"].item() == pytest.approx(expected[0], rel=1e-10)
    assert losses["transport"].item() == pytest.approx(expected[1], rel=1e-9)


def test_target_term_on_paper(pair):
    """Student 1/8, 2/8, 5/8 and teacher 1/2, 1/4, 1/4; the target is class 1."""
    shapes = dataclasses.replace(pair.student, classes=3), dataclasses.replace(pair.teacher, classes=3)
    student, teacher, _ = pair.features(batch=1)
    student.logits = torch.tensor([[log(1), log(2), log(5)]])
    teacher.logits = torch.tensor([[log(2), log(1), log(1)]])
    teacher.classify = torch.nn.Linear(teacher.pooled.shape[1], 3).double()
    losses = WKDL(*shapes)(student, teacher, torch.tensor([1]))
    assert losses["target"].item() == pytest.approx(-0.25 * log(2 / 8), rel=1e-6)


def test_related_classes_are_nearer(pair):
    """A student that takes the probability of a class for that of another pays less if the teacher relates the two."""
    _, teacher, _ = pair.features(batch=1)
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    teacher.pooled, teacher.classify = torch.zeros(1, 2), torch.nn.Linear(2, 4)
    teacher.classify.weight.data = rows
    cost, start = costs(class_rows(teacher), 1.0), torch.full((1, 4), 0.25)
    at = torch.eye(4)[:1]
    near, far, opposite = (transport(at, torch.eye(4)[i : i + 1], start, cost, 0.05, 50).item() for i in (1, 2, 3))
    assert near < 0.01 < far < opposite


def test_gradient(pair):
    student, teacher, targets = pair.features()
    method = WKDL(pair.student, pair.teacher)

    def both(logits):
        return tuple(method(dataclasses.replace(student, logits=logits), teacher, targets).values())

    assert torch.autograd.gradcheck(both, student.logits)
    sum(method(student, teacher, targets).values()).backward()
    assert student.logits.grad.abs().max() > 1e-6
    assert all(x.grad is None for x in (student.final, *student.maps, teacher.logits, teacher.pooled))
    assert not list(method.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair, dtype):
    check_half_precision(lambda: WKDL(pair.student, pair.teacher), pair, dtype)


def test_extreme_logits_stay_finite(pair):
    student, teacher, targets = pair.features(dtype=torch.float32)
    student.logits = (student.logits.detach() * 1e4).requires_grad_()
    teacher.logits = teacher.logits.detach() * 1e4
    losses = WKDL(pair.student, pair.teacher)(student, teacher, targets)
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values()) and student.logits.grad.isfinite().all()


S3 = Shapes("s", ((1, 1, 1),) * 4, (1, 1, 1), 3, pooled=2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda s: WKDL(s, dataclasses.replace(s, pooled=0)), "single classifier"),
        (lambda s: WKDL(s, dataclasses.replace(s, classes=0)), "no classifier"),
        (lambda s: WKDL(s, dataclasses.replace(s, classes=7)), "7"),
        (lambda s: WKDL(*[dataclasses.replace(s, classes=2)] * 2), "three classes"),
        (lambda s: WKDL(s, s, gamma=0.0), "gamma"),
        (lambda s: WKDL(s, s, temperature=0.0), "temperature"),
        (lambda s: WKDL(s, s, sharpness=0.0), "sharpness"),
        (lambda s: WKDL(s, s, regularization=0.0), "regularization"),
        (lambda s: WKDL(s, s, iterations=0), "iterations"),
    ],
)
def test_rejected_options(build, message):
    with pytest.raises(ValueError, match=message):
        build(S3)
