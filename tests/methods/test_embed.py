"""`embed` by hand, its gradient, and what it must notice: teacher embeddings of other images."""

from __future__ import annotations

import copy
import dataclasses
from math import sqrt

import numpy as np
import pytest
import torch
from by_hand import check_half_precision, randomised

from scalekd.methods.embed import Embed
from scalekd.models.stages import Features, Shapes

TINY = Shapes("tiny", ((2, 1, 1),) * 4, (2, 1, 1), 0, pooled=2)
NONE = torch.zeros(3)


def of(points: list[list[float]], **more: torch.Tensor) -> Features:
    x = torch.tensor(points, dtype=torch.float64)
    return Features(torch.empty(len(x), 0), (), None, pooled=x.requires_grad_(), **more)


def test_by_hand():
    """Student at 0, 90 and 180 degrees, teacher at 0, 60 and 90, whatever their lengths. Cosines of the angles between
    them: 1, sqrt(3)/2, 0. Distances: student sqrt(2), sqrt(2), 2; teacher 1, 2 sin(15), sqrt(2) for 60, 30 and 90 degrees."""
    student, teacher = of([[2, 0], [0, 3], [-1, 0]]), of([[5, 0], [1, sqrt(3)], [0, 0.1]])
    losses = Embed(TINY, TINY, cosine=2.0, relational=3.0)(student, teacher, NONE)
    assert losses["cosine"].item() == pytest.approx(2 * (2 - sqrt(3) / 2) / 3, rel=1e-12)
    ours, theirs = np.array([sqrt(2), sqrt(2), 2]), np.array([1, 2 * np.sin(np.pi / 12), sqrt(2)])
    # pairs 1-2, 2-3, 1-3, each both ways of 9; the differences are below 1, so the Huber loss is half the square
    difference = ours / ours.mean() - theirs / theirs.mean()
    assert losses["relational"].item() == pytest.approx(3 * 2 * (difference**2 / 2).sum() / 9, rel=1e-12)


def test_the_gradient_of_the_cosine_by_hand():
    """d(1 - cos)/ds is -(t/|t| - cos * s/|s|) / |s|, over the number of images; through a projector P it is P^T of that."""
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(4, n, generator=generator, dtype=torch.float64) for n in (3, 5))
    wide = dataclasses.replace(TINY, pooled=5)
    method = randomised(Embed(dataclasses.replace(TINY, pooled=3), wide, relational=0))
    student = Features(torch.empty(4, 0), pooled=s.clone().requires_grad_())
    method(student, Features(torch.empty(4, 0), pooled=t), NONE)["cosine"].backward()
    p, bias = method.projector.weight.detach().numpy(), method.projector.bias.detach().numpy()
    x, y = s.numpy() @ p.T + bias, t.numpy()
    unit_x, unit_y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    cos = (unit_x * unit_y).sum(1, keepdims=True)
    wanted = -(unit_y - cos * unit_x) / np.linalg.norm(x, axis=1, keepdims=True) / 4
    np.testing.assert_allclose(student.pooled.grad.numpy(), wanted @ p, rtol=1e-10)
    np.testing.assert_allclose(method.projector.weight.grad.numpy(), wanted.T @ s.numpy(), rtol=1e-10)


def test_gradient_of_both_terms(pair):
    student, teacher, targets = pair.features(batch=4)
    student.pooled = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    method = randomised(Embed(dataclasses.replace(pair.student, pooled=7), pair.teacher))
    assert torch.autograd.gradcheck(lambda _: sum(method(student, teacher, targets).values()), student.pooled)
    sum(method(student, teacher, targets).values()).backward()
    assert teacher.pooled.grad is None and student.final.grad is None


def test_embeddings_of_other_images_are_worse():
    """A student with the teacher's own embeddings has no loss, and one with those of other images has both."""
    t = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    shapes = dataclasses.replace(TINY, pooled=6)
    method, teacher = Embed(shapes, shapes), Features(torch.empty(8, 0), pooled=t)
    own = method(Features(torch.empty(8, 0), pooled=3 * t), teacher, NONE)
    assert all(abs(value.item()) < 1e-6 for value in own.values())
    for shift in (1, 3):
        shuffled = Features(torch.empty(8, 0), pooled=t.roll(shift, 0))
        other = method(Features(torch.empty(8, 0), pooled=t), shuffled, NONE)
        assert other["cosine"] > 0.5 and other["relational"] > 0.01


def test_a_head_s_embedding_comes_before_pooled_features():
    x, e, t = torch.randn(3, 4), torch.randn(3, 2), torch.randn(3, 2)
    shapes = dataclasses.replace(TINY, pooled=4, embedding=2)
    method = Embed(shapes, shapes)
    none = torch.empty(3, 0)
    with_head = Features(none, pooled=x, embedding=e), Features(none, pooled=x, embedding=t)
    alone = Features(none, pooled=e), Features(none, pooled=t)
    for key, value in method(*with_head, NONE).items():
        assert torch.equal(value, method(*alone, NONE)[key]) and value > 0
    assert not list(method.parameters())  # equal lengths need no projector


def test_terms_can_be_left_out(pair):
    student, teacher, targets = pair.features()
    assert list(Embed(pair.student, pair.teacher, cosine=0)(student, teacher, targets)) == ["relational"]
    assert not list(Embed(pair.student, pair.teacher, cosine=0).parameters())
    both = Embed(pair.student, pair.teacher).double()
    alone = copy.deepcopy(both)
    alone.relational = 0
    assert torch.equal(alone(student, teacher, targets)["cosine"], both(student, teacher, targets)["cosine"])
    for options in ({"cosine": -1.0}, {"cosine": 0.0, "relational": 0.0}):
        with pytest.raises(ValueError, match="embed: cosine is"):
            Embed(pair.student, pair.teacher, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair, dtype):
    check_half_precision(
        lambda: Embed(pair.student, dataclasses.replace(pair.teacher, pooled=0)), pair_without_pooled(pair), dtype
    )


def pair_without_pooled(pair):
    """The features' pooled vectors stay in full precision in `check_half_precision`, so the final maps are used."""
    features = pair.features

    def without(**options):
        student, teacher, targets = features(**options)
        teacher.pooled = None
        return student, teacher, targets

    pair.features = without
    return pair
