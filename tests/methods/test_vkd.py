from __future__ import annotations

import numpy as np
import pytest
import torch
from by_hand import check_gradients, check_half_precision, randomised, values

from scalekd.methods.vkd import OrthogonalProjection, VkD
from scalekd.models.stages import Features, Shapes


def test_on_paper():
    """One channel to one: P is 1 or -1. A feature of one channel is its own mean, so its target is 0: the smooth L1
    distances of 0.6 and 3 are 0.6^2 / 2 and 3 - 1/2."""
    one = Shapes("s", ((1, 1, 1),) * 4, (1, 1, 1), 0)
    student = Features(torch.empty(2, 0), (), torch.tensor([0.6, -3.0]).reshape(2, 1, 1, 1))
    teacher = Features(torch.empty(2, 0), (), torch.tensor([5.0, 7.0]).reshape(2, 1, 1, 1))
    loss = VkD(one, one)(student, teacher, torch.zeros(2))["vkd"]
    assert loss.item() == pytest.approx((0.18 + 2.5) / 2, rel=1e-6)


def test_against_numpy(pair):
    method = randomised(VkD(pair.student, pair.teacher))
    student, teacher, targets = pair.features()
    x, y = values(student.final).mean((2, 3)), values(teacher.final).mean((2, 3))
    y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5)
    off = np.abs(x @ values(method.projector.matrix()).T - y)
    expected = np.where(off < 1, off**2 / 2, off - 0.5).mean()
    assert method(student, teacher, targets)["vkd"].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("before", "after"), [(3, 7), (7, 3), (5, 5)])
def test_the_projection_is_the_cayley_transform_and_orthogonal(before, after):
    layer = randomised(OrthogonalProjection(before, after))
    X, W = values(layer.base), values(layer.turn)
    A, identity = W @ X.T - X @ W.T, np.eye(max(before, after))
    turned = np.linalg.solve(identity + A / 2, (identity - A / 2) @ X)
    P = values(layer.matrix())
    np.testing.assert_allclose(P, turned if after >= before else turned.T, atol=1e-12)
    product = P.T @ P if after >= before else P @ P.T
    np.testing.assert_allclose(product, np.eye(min(before, after)), atol=1e-5)  # X was made in float32
    assert np.abs(P - (X if after >= before else X.T)).max() > 0.1  # it has turned


def test_angles_and_lengths_are_kept():
    layer = randomised(OrthogonalProjection(4, 9))
    x = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x) @ layer(x).T, x @ x.T, atol=1e-5, rtol=1e-5)


def test_it_stays_orthogonal_and_learns():
    """Adam cannot leave the orthogonal matrices, and finds the one that made the targets."""
    torch.manual_seed(0)
    layer, wanted = OrthogonalProjection(4, 6), torch.linalg.qr(torch.randn(6, 4))[0]
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    x = torch.randn(64, 4)
    losses = []
    for _ in range(300):
        loss = (layer(x) - x @ wanted.T).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    P = layer.matrix().detach()
    assert losses[-1] < losses[0] / 100
    torch.testing.assert_close(P.T @ P, torch.eye(4), atol=1e-5, rtol=0)


def test_state_gives_the_same_projection():
    torch.manual_seed(0)
    one = randomised(OrthogonalProjection(3, 5))
    other = OrthogonalProjection(3, 5).double()
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.matrix(), other.matrix())


def test_gradients(pair):
    check_gradients(VkD(pair.student, pair.teacher), pair, (4,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair, dtype):
    check_half_precision(lambda: VkD(pair.student, pair.teacher), pair, dtype)
