from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn

from scalekd.methods.distance import normalized_distance, only_direct, remove_direct
from scalekd.methods.fd import FD
from scalekd.methods.projectors import CrossAttentionProjector
from scalekd.models.stages import Features, Shapes

GRIDS = [(7, 7), (5, 4), (1, 6), (16, 16)]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("norm", ["ortho", None])
def test_remove_direct_is_dct_without_its_first_coefficient(grid, norm):
    x = random(2, 3, *grid) + 4
    z = dctn(x.numpy(), axes=(2, 3), norm=norm)
    direct = np.zeros_like(z)
    direct[:, :, 0, 0] = z[:, :, 0, 0]
    expected = idctn(z - direct, axes=(2, 3), norm=norm)
    np.testing.assert_allclose(remove_direct(x).numpy(), expected, atol=1e-13)
    np.testing.assert_allclose(only_direct(x).numpy(), idctn(direct, axes=(2, 3), norm=norm), atol=1e-13)


def distance_by_loops(a: np.ndarray, t: np.ndarray) -> float:
    """Summed over positions, averaged over samples."""
    total = 0.0
    for b in range(a.shape[0]):
        for i in range(a.shape[2]):
            for j in range(a.shape[3]):
                u, v = a[b, :, i, j], t[b, :, i, j]
                total += ((u / np.sqrt((u**2).sum()) - v / np.sqrt((v**2).sum())) ** 2).sum()
    return total / a.shape[0]


@pytest.mark.parametrize("grid", GRIDS)
def test_distance_against_loops(grid):
    a, t = random(3, 5, *grid), random(3, 5, *grid).flip(0) * 10
    expected = distance_by_loops(a.numpy(), t.numpy())
    positions = grid[0] * grid[1]
    np.testing.assert_allclose(normalized_distance(a, t).item(), expected, rtol=1e-12)
    np.testing.assert_allclose(normalized_distance(a, t, "mean").item(), 49 * expected / positions, rtol=1e-12)


def test_mean_is_the_released_sum_at_7x7_only():
    a, t = random(2, 5, 7, 7), random(2, 5, 7, 7).flip(0)
    torch.testing.assert_close(normalized_distance(a, t, "mean"), normalized_distance(a, t, "sum"))
    a, t = a[..., :4], t[..., :4]
    torch.testing.assert_close(normalized_distance(a, t, "mean"), normalized_distance(a, t, "sum") * 7 / 4)


def test_distance_extremes():
    a = random(2, 5, 3, 2)
    assert normalized_distance(a, 7 * a).item() == pytest.approx(0, abs=1e-12)
    assert normalized_distance(a, -a).item() == pytest.approx(4 * 6)


def test_gradients():
    a, t = random(2, 3, 2, 3).requires_grad_(), random(2, 3, 2, 3).flip(0)
    for reduction in ("sum", "mean"):
        assert torch.autograd.gradcheck(lambda a, r=reduction: normalized_distance(a, t, r), a)
        assert torch.autograd.gradcheck(
            lambda a, r=reduction: normalized_distance(remove_direct(a), remove_direct(t), r), a
        )
        assert torch.autograd.gradcheck(lambda a, r=reduction: normalized_distance(only_direct(a), t, r), a)


def test_zero_vectors_normalise_to_zero_without_gradient():
    a, t = random(1, 3, 2, 2), random(1, 3, 2, 2).flip(1)
    a[:, :, 0, 0] = 0  # only the student's is zero
    t[:, :, 0, 1] = 0  # only the teacher's
    a[:, :, 1, 0] = t[:, :, 1, 0] = 0  # both
    expected = 1 + 1 + 0 + distance_by_loops(a[:, :, 1:, 1:].numpy(), t[:, :, 1:, 1:].numpy())
    a.requires_grad_()
    loss = normalized_distance(a, t)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert (a.grad[:, :, 0] == 0).all() and (a.grad[:, :, 1, 0] == 0).all()
    assert a.grad[:, :, 1, 1].isfinite().all() and (a.grad[:, :, 1, 1] != 0).all()


def test_float32_under_autocast():
    a, t = random(2, 64, 7, 7).bfloat16() + 3, random(2, 64, 7, 7).flip(0).bfloat16() + 3
    with torch.autocast("cpu", torch.bfloat16):
        low = [normalized_distance(a, t), remove_direct(a), only_direct(a)]
    full = [normalized_distance(a.float(), t.float()), remove_direct(a.float()), only_direct(a.float())]
    for x, y in zip(low, full, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y)


# Two channels, one row of two positions: cosines 24/25 and 0, so squared distances 0.08 and 2.
STUDENT = torch.tensor([[[[3.0, 1.0]], [[4.0, 0.0]]]])
TEACHER = torch.tensor([[[[4.0, 0.0]], [[3.0, 1.0]]]])
SHAPES = Shapes("m", ((2, 1, 2),) * 4, (2, 1, 2), 0)


def identity_fd(**options) -> FD:
    fd = FD(SHAPES, SHAPES, **options)
    for projector in fd.projectors.values():
        torch.nn.init.eye_(projector[1].weight[:, :, 0, 0])
        torch.nn.init.zeros_(projector[1].bias)
    return fd


def test_fd_by_hand():
    final_only = [
        Features(torch.empty(1, 0), (torch.full((1, 2, 1, 2), torch.nan),) * 4, x) for x in (STUDENT, TEACHER)
    ]
    targets = torch.tensor([0])
    assert identity_fd(alpha=2.0, reduction="sum")(*final_only, targets)["s4"].item() == pytest.approx(2 * 2.08)
    assert identity_fd()(*final_only, targets)["s4"].item() == pytest.approx(0.14 * 49 * 1.04)


def test_fd_stage_3_is_the_raw_third_map_and_stage_4_the_final_one():
    nan = torch.full((1, 2, 1, 2), torch.nan)
    student = Features(torch.empty(1, 0), (nan, nan, STUDENT, nan), STUDENT)
    teacher = Features(torch.empty(1, 0), (nan, nan, TEACHER, nan), 5 * STUDENT)
    losses = identity_fd(stages=(3, 4), alpha=1.0, reduction="sum")(student, teacher, torch.tensor([0]))
    assert list(losses) == ["s3", "s4"]
    assert losses["s3"].item() == pytest.approx(2.08)
    assert losses["s4"].item() == pytest.approx(0, abs=1e-6)


def test_fd_cap_takes_its_heads_stage_by_stage(pair):
    fd = FD(pair.student, pair.teacher, stages=(4, 3), projector="cap", heads=(6, 2), norm="layer")
    caps = list(fd.projectors.values())
    assert all(isinstance(cap, CrossAttentionProjector) for cap in caps)
    assert [cap.heads for cap in caps] == [6, 2]
    assert [tuple(cap.queries.shape) for cap in caps] == [(3 * 2, 12), (6 * 4, 8)]
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fd.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ()}, "stages"),
        ({"stages": (0,)}, "stages"),
        ({"stages": (4, 5)}, "stages"),
        ({"stages": (4, 4)}, "stages"),
        ({"projector": "mlp"}, "projector"),
        ({"heads": (4,)}, "heads is an option of projector 'cap' only"),
        ({"projector": "conv", "heads": (4,)}, "heads is an option of projector 'cap' only"),
        ({"projector": "cap", "heads": (4, 4)}, "2 numbers for 1 stages"),
        ({"projector": "cap", "heads": (5,)}, "does not divide"),
        ({"norm": "batch"}, "norm is an option of projectors"),
        ({"projector": "conv", "norm": "group"}, "'batch' or 'layer'"),
        ({"alpha": 0.0}, "alpha"),
        ({"reduction": "max"}, "reduction"),
    ],
)
def test_rejected_options_of_fd(pair, options, message):
    with pytest.raises(ValueError, match=message):
        FD(pair.student, pair.teacher, **options)


def test_fd_needs_maps_of_both(pair):
    with pytest.raises(ValueError, match="needs a teacher"):
        FD(pair.student, None)
    for shapes in (pair.student, pair.teacher):
        blind = dataclasses.replace(shapes, model="blind", maps=(), final=None)
        models = [blind if shapes is m else m for m in (pair.student, pair.teacher)]
        with pytest.raises(ValueError, match="blind gives logits only"):
            FD(*models)
