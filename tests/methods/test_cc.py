from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from scalekd.methods.cc import CC
from scalekd.models.stages import Features, Shapes

TINY = Shapes("tiny", ((2, 1, 2),) * 4, (2, 1, 2), 0)


def of(*images: list[list[float]]) -> Features:
    """Each image: two channels of a row of two positions."""
    x = torch.tensor(images)[:, :, None, :]
    return Features(torch.empty(len(images), 0), (torch.full_like(x, torch.nan),) * 4, x)


def identity(**options) -> CC:
    method = CC(TINY, TINY, dim=2, **options)
    for layer in (method.embed_student, method.embed_teacher):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return method


def test_by_hand():
    # Pooled: (2, 0), (5, 1), (0, 0). Teacher: (0, 0), (1, 3), (4, 2).
    student = of([[1.0, 3.0], [0.0, 0.0]], [[5.0, 5.0], [2.0, 0.0]], [[1.0, -1.0], [0.0, 0.0]])
    teacher = of([[0.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [3.0, 3.0]], [[4.0, 4.0], [0.0, 4.0]])
    # Differences: (2, 0), (4, 2), (4, 2). Neighbours: 2 * 4 + 0 * 2 = 8 and 4 * 4 + 2 * 2 = 20, mean 14.
    assert identity()(student, teacher, torch.zeros(3))["cc"].item() == pytest.approx(0.02 * 14)
    assert identity(scale=0.5)(student, teacher, torch.zeros(3))["cc"].item() == pytest.approx(0.5 * 14)


def test_against_numpy_for_other_channels_and_grids(pair):
    method = CC(pair.student, pair.teacher, dim=7, scale=1.0).double()
    student, teacher, targets = pair.features(batch=5)

    def embedded(layer, features):
        x = features.final.detach().numpy().mean(axis=(2, 3))
        return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()

    d = np.abs(embedded(method.embed_student, student) - embedded(method.embed_teacher, teacher))
    expected = np.mean([d[i] @ d[i + 1] for i in range(4)])
    assert method(student, teacher, targets)["cc"].item() == pytest.approx(expected, rel=1e-10)


def test_gradients(pair):
    method = CC(pair.student, pair.teacher, dim=3).double()
    student, teacher, targets = pair.features()
    assert torch.autograd.gradcheck(
        lambda x, *_: method(Features(student.logits, (), x), teacher, targets)["cc"],
        (student.final, *method.parameters()),
    )
    method(student, teacher, targets)["cc"].backward()
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())
    assert teacher.final.grad is None


def test_default_width():
    method = CC(TINY, TINY)
    assert method.embed_student.weight.shape == method.embed_teacher.weight.shape == (128, 2)


def test_one_image_has_no_neighbour_and_its_zero_has_a_gradient(pair):
    method = CC(pair.student, pair.teacher).double()
    student, teacher, targets = pair.features(batch=1)
    loss = method(student, teacher, targets)["cc"]
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in method.parameters())  # not None: DDP would wait for it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(pair, dtype, autocast):
    method = CC(pair.student, pair.teacher)
    student, teacher, targets = pair.features(dtype=dtype)
    large = (student.final.detach() * 1e4).requires_grad_()  # products overflow in float16
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = method(Features(student.logits, (), large), teacher, targets)["cc"]
    full = [Features(f.logits, (), x.detach().float()) for f, x in ((student, large), (teacher, teacher.final))]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(method(*full, targets)["cc"].item(), rel=0.02 if autocast else 1e-6)
    loss.backward()
    assert large.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"dim": 0}, {"scale": 0.0}])
def test_rejected_options(pair, options):
    with pytest.raises(ValueError, match="must be positive"):
        CC(pair.student, pair.teacher, **options)


def test_unsupported_models(pair):
    with pytest.raises(ValueError, match="needs a teacher"):
        CC(pair.student, None)
    blind = dataclasses.replace(pair.student, model="blind", maps=(), final=None)
    with pytest.raises(ValueError, match="blind gives logits only"):
        CC(blind, pair.teacher)
