from __future__ import annotations

import dataclasses
import itertools
from math import acos, cos, sqrt

import numpy as np
import pytest
import torch

from scalekd.methods.rkd import RKD, relations
from scalekd.models.stages import Features


def of(points: list[list[float]] | np.ndarray, dtype: torch.dtype = torch.float64) -> Features:
    """Features whose pooled final maps are the points: half of the value at each of two positions, twice."""
    x = torch.as_tensor(np.asarray(points), dtype=dtype)[:, :, None, None]
    return Features(torch.empty(len(x), 0), (x,) * 4, torch.cat([x / 2, x * 3 / 2], dim=3).requires_grad_())


def huber(x: float) -> float:
    return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5


def test_by_hand(pair):
    """Student: the right-angled triangle with legs 3 and 4, distances 3, 4, 5 over their mean 4. Teacher: an
    equilateral one, distances 1, 1, 1. Pairs both ways, and 9 in all. Cosines 0, 3/5, 4/5 against 1/2 thrice; each
    angle both ways, 27 in all. Where the outer two are the same image, cosine 1 for both: 6 of 27 without loss."""
    student, teacher = of([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]), of([[0.0, 0.0], [2.0, 0.0], [1.0, sqrt(3)]])
    losses = RKD(pair.student, pair.teacher)(student, teacher, torch.zeros(3))
    distance = 2 * (huber(0.25) + huber(0.0) + huber(0.25)) / 9
    angle = 2 * (huber(0.5) + huber(0.1) + huber(0.3)) / 27
    assert losses["distance"].item() == pytest.approx(25 * distance, rel=1e-10)
    assert losses["angle"].item() == pytest.approx(50 * angle, rel=1e-10)


def by_loops(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances over their mean, and cosines by the law of cosines."""
    n = len(x)
    d = np.array([[sqrt(sum((a - b) ** 2)) for b in x] for a in x])
    mean = np.mean([d[i, j] for i, j in itertools.permutations(range(n), 2)])
    cosines = np.zeros((n, n, n))
    for j, i, k in itertools.product(range(n), repeat=3):
        if j not in (i, k):
            value = (d[i, j] ** 2 + d[k, j] ** 2 - d[i, k] ** 2) / (2 * d[i, j] * d[k, j])
            cosines[j, i, k] = cos(acos(min(1.0, max(-1.0, value))))
    return d / mean, cosines


def test_against_loops_for_other_channels_and_grids(pair):
    student, teacher, targets = pair.features(batch=6)
    (ds, cs), (dt, ct) = (by_loops(f.final.detach().mean(dim=(2, 3)).numpy()) for f in (student, teacher))
    assert ds.max() > 1 and not np.allclose(cs, ct, atol=0.1)
    losses = RKD(pair.student, pair.teacher, distance=2.0, angle=3.0)(student, teacher, targets)
    h = np.vectorize(huber)
    assert losses["distance"].item() == pytest.approx(2 * h(ds - dt).mean(), rel=1e-10)
    assert losses["angle"].item() == pytest.approx(3 * h(cs - ct).mean(), rel=1e-10)


def test_size_place_and_rotation_do_not_matter(pair):
    student, _, targets = pair.features(batch=5)
    turned, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    other = Features(student.logits, (), torch.einsum("dc,bchw->bdhw", turned, student.final) * 7 + 100)
    losses = RKD(pair.student, pair.student)(student, other, targets)
    assert all(0 <= v.item() < 1e-20 for v in losses.values())


def test_gradient(pair):
    student, teacher, targets = pair.features(batch=4)
    method = RKD(pair.student, pair.teacher)
    assert torch.autograd.gradcheck(
        lambda x: tuple(method(Features(student.logits, (), x), teacher, targets).values()), student.final
    )
    sum(method(student, teacher, targets).values()).backward()
    assert teacher.final.grad is None


def test_images_in_one_place(pair):
    """Twice the same image: no direction between them, and neither nan nor a huge gradient."""
    student, teacher = of([[1.0, 2.0], [1.0, 2.0], [4.0, 6.0]]), of([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    method = RKD(pair.student, pair.teacher)
    losses = method(student, teacher, torch.zeros(3))
    # The mean is of the distances above 0, 5: relative distances 0, 1, 1 against 3/4, 1, 5/4.
    assert losses["distance"].item() == pytest.approx(25 * 2 * (huber(3 / 4) + huber(1 / 4)) / 9)
    sum(losses.values()).backward()
    assert student.final.grad.isfinite().all() and student.final.grad.abs().max() < 100


@pytest.mark.parametrize("batch", [1, 2])
def test_small_batches(pair, batch):
    """One image has no relation; of two the relative distance is 1 and the only angles are 0."""
    student, teacher, targets = pair.features(batch=batch)
    losses = RKD(pair.student, pair.teacher)(student, teacher, targets)
    assert all(v.item() == pytest.approx(0, abs=1e-20) for v in losses.values())
    sum(losses.values()).backward()
    assert student.final.grad.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pair, dtype):
    student, teacher, targets = pair.features(batch=4, dtype=dtype)
    large = student.final.detach() * 1e4  # sums and squares overflow in float16
    full = [Features(f.logits, (), x.detach().float()) for f, x in ((student, large), (teacher, teacher.final))]
    method = RKD(pair.student, pair.teacher)
    large.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        losses = method(Features(student.logits, (), large), teacher, targets)
    for name, value in method(*full, targets).items():
        assert losses[name].dtype == torch.float32 and torch.equal(losses[name], value)
    sum(losses.values()).backward()
    assert large.grad.isfinite().all()


def test_images_close_to_each_other_keep_their_angle():
    """Differences of 1e-4 at a distance of 10 from the origin, which products of features in float32 would lose."""
    near = 10 + 1e-4 * torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    _, cosines = relations(near)
    assert cosines[0, 1, 2].item() == pytest.approx(0, abs=0.02)
    assert cosines[1, 0, 2].item() == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"distance": -1.0}, "distance is -1.0"), ({"distance": 0.0, "angle": 0.0}, "one must be positive")],
)
def test_rejected_options(pair, options, message):
    with pytest.raises(ValueError, match=message):
        RKD(pair.student, pair.teacher, **options)


def test_unsupported_models(pair):
    with pytest.raises(ValueError, match="needs a teacher"):
        RKD(pair.student, None)
    blind = dataclasses.replace(pair.teacher, model="blind", maps=(), final=None)
    with pytest.raises(ValueError, match="blind gives logits only"):
        RKD(pair.student, blind)
