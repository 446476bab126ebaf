from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from by_hand import cells, check_gradients, check_half_precision, values

from scalekd.methods.at import AttentionTransfer
from scalekd.models.stages import Features, Shapes


def test_on_paper():
    shapes = Shapes("m", ((2, 1, 2),) * 4, (2, 1, 2), 0)
    # Energy of the student: (9 + 16) / 2 at the first position, 0 at the second: attention (1, 0).
    student = torch.tensor([[[[3.0, 0.0]], [[4.0, 0.0]]]])
    # Of the teacher: 3 and 4, so attention (0.6, 0.8). Squared differences 0.16 and 0.64, mean 0.4.
    teacher = torch.tensor([[[[6.0**0.5, 0.0]], [[0.0, 8.0**0.5]]]])
    nan = torch.full((1, 2, 1, 2), torch.nan)  # the other stages and the map after the final norm are not looked at
    batch = *(Features(torch.empty(1, 0), (nan, nan, nan, x), nan) for x in (student, teacher)), torch.tensor([0])
    method = AttentionTransfer(shapes, shapes, stages=(4,), alpha=2.0)
    assert method(*batch) == {"s4": pytest.approx(0.8)}


def test_against_numpy(pair):
    student, teacher, targets = pair.features()
    losses = AttentionTransfer(pair.student, pair.teacher)(student, teacher, targets)
    for stage, (s, t) in enumerate(zip(student.maps, teacher.maps), start=1):
        grid = np.minimum(s.shape[2:], t.shape[2:])
        attentions = []
        for x in (values(s), values(t)):
            energy = cells((x**2).mean(1, keepdims=True), grid).reshape(len(x), -1)
            attentions.append(energy / np.sqrt((energy**2).sum(1, keepdims=True)))
        expected = 1000 * ((attentions[0] - attentions[1]) ** 2).mean()
        assert losses[f"s{stage}"].item() == pytest.approx(expected, rel=1e-10)
    assert list(losses) == ["s1", "s2", "s3", "s4"]


def test_the_same_energy_elsewhere_and_other_scales_count_nothing(pair):
    """Channels may be swapped and maps scaled; only where the energy lies matters."""
    student, _, targets = pair.features()
    twin = Features(student.logits, tuple(-3 * m.flip(1) for m in student.maps))
    method = AttentionTransfer(pair.student, pair.student)
    assert all(v.item() == pytest.approx(0, abs=1e-12) for v in method(student, twin, targets).values())
    moved = Features(student.logits, tuple(m.flip(3) for m in student.maps))
    assert all(v > 1 for v in method(student, moved, targets).values())


@pytest.mark.parametrize("stages", [(1, 2, 3, 4), (4,), (3, 1)])
def test_gradients(pair, stages):
    check_gradients(AttentionTransfer(pair.student, pair.teacher, stages=stages), pair, stages, raw=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair, dtype):
    check_half_precision(lambda: AttentionTransfer(pair.student, pair.teacher), pair, dtype, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ()}, "stages"),
        ({"stages": (5,)}, "stages"),
        ({"stages": (3, 3)}, "stages"),
        ({"alpha": 0.0}, "alpha"),
    ],
)
def test_rejected_options(pair, options, message):
    with pytest.raises(ValueError, match=message):
        AttentionTransfer(pair.student, pair.teacher, **options)


def test_one_position(pair):
    point = dataclasses.replace(pair.student, maps=(*pair.student.maps[:3], (8, 1, 1)))
    with pytest.raises(ValueError, match="the common grid of stage 4 has one position"):
        AttentionTransfer(point, pair.teacher)
    assert AttentionTransfer(point, pair.teacher, stages=(1, 2, 3))
