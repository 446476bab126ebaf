"""The term `masked` of `fm`: what is hidden, that the loss compares those positions, and which students can have it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from by_hand import randomised, values
from torch import nn
from torch.nn import functional as F

from scalekd import Distiller
from scalekd.common.errors import UserError
from scalekd.methods.fm import FM, Hide
from scalekd.models.stages import Features

IMAGE = (3, 12, 8)  # 3x2 cells of 4x4 pixels


@pytest.fixture
def second(pair):
    """The pair, with a student whose second pass averages its images over the cells of its grid and mixes the channels."""
    pair.student = replace(pair.student, image=IMAGE, final=(8, 3, 2))
    mix = nn.Linear(3, 8).double()
    pair.seen = []

    def again(images):
        pair.seen.append(images)
        return Features(logits=images.new_zeros(len(images), 0), final=look(mix, images).permute(0, 3, 1, 2))

    def features(batch=3):
        student, teacher, targets = pair.features(batch)
        student.images, student.again = torch.rand(batch, *IMAGE, dtype=torch.float64) + 1, again
        return student, teacher, targets

    pair.mix, pair.second = mix, features
    return pair


def look(mix, images):
    """(B, rows, columns, 8): of every cell, with something of all others."""
    cells = mix(F.avg_pool2d(images, 4).permute(0, 2, 3, 1))
    return cells + cells.mean(dim=(1, 2), keepdim=True)


def options(**more):
    return {"standardise": "none", "hidden": 0, "masked_weight": 2.0, "mask_ratio": 0.5} | more


def hidden_cells(before, after):
    """(B, cells) of which pixels differ, row by row."""
    changed = (before != after).any(dim=1).double()
    return F.max_pool2d(changed, 4).flatten(1).bool()


def test_by_numpy(second):
    method = randomised(FM(second.student, second.teacher, **options(loss="mse")))
    student, teacher, targets = second.second()
    got = method(student, teacher, targets)["masked"]
    (images,) = second.seen
    hidden = hidden_cells(student.images, images).numpy()
    assert (hidden.sum(1) == 3).all()

    x = values(look(second.mix, images)).reshape(3, 6, 8)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    norm, linear = method.projectors["masked"]
    x = (x * values(norm.weight) + values(norm.bias)) @ values(linear.weight).T + values(linear.bias)
    t = values(teacher.final).transpose(0, 2, 3, 1).reshape(3, 6, 12)
    want = np.stack([((a - b) ** 2).mean(-1)[h].mean() for a, b, h in zip(x, t, hidden)]).mean()
    assert got.item() == pytest.approx(2 * want, rel=1e-9)


def test_masked_cells_show_the_learned_pixels_and_others_are_untouched():
    hide = Hide(IMAGE, (3, 2), 0.3)
    nn.init.normal_(hide.pixels)
    images = torch.rand(50, *IMAGE) + 5
    masked, positions = hide(images)
    assert positions.shape == (50, 2)
    expected = images.clone()
    for i, cells in enumerate(positions.tolist()):
        for cell in cells:
            row, column = 4 * (cell // 2), 4 * (cell % 2)
            expected[i, :, row : row + 4, column : column + 4] = hide.pixels
    assert torch.equal(masked, expected)
    assert positions.flatten().bincount(minlength=6).min() > 5  # every cell is masked now and then


def test_a_masked_patch_is_one_token_for_a_vit():
    student = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    hide = Hide((3, 64, 64), (4, 4), None)
    nn.init.normal_(hide.pixels)
    masked, positions = hide(torch.rand(2, 3, 64, 64))
    tokens = student.patch_embed(masked)
    one = tokens[0, positions[0, 0]]
    hidden = torch.zeros(2, 16, dtype=torch.bool).scatter(1, positions, True)
    assert positions.shape == (2, 5)  # 0.3 of 16
    torch.testing.assert_close(tokens[hidden], one.expand(10, -1))
    assert ((tokens[~hidden] - one).abs().amax(dim=1) > 0.1).all()


def test_what_is_behind_the_mask_does_not_matter(second):
    """Of the images only; the teacher's tokens there are the targets."""
    method = randomised(FM(second.student, second.teacher, **options()))
    student, teacher, targets = second.second()

    def loss():
        torch.manual_seed(4)
        return method(student, teacher, targets)["masked"]

    before, first = loss(), student.images
    hidden = hidden_cells(first, second.seen[0]).view(3, 1, 3, 2).double()
    inside = F.interpolate(hidden, scale_factor=4).bool()
    student.images = torch.where(inside, first + 3, first)
    assert torch.equal(loss(), before)
    student.images = torch.where(inside, first, first + torch.rand_like(first))
    assert not torch.equal(loss(), before)
    student.images = first
    shown = hidden.expand(-1, 12, -1, -1) == 0
    teacher.final = torch.where(shown, teacher.final + 3, teacher.final)
    assert torch.equal(loss(), before)
    teacher.final = torch.where(shown, teacher.final, teacher.final + 3)
    assert not torch.equal(loss(), before)


def test_every_parameter_gets_a_gradient_and_so_does_the_student(second):
    method = randomised(FM(second.student, second.teacher, **options()))
    sum(method(*second.second()).values()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-12 for p in (*method.parameters(), second.mix.weight))


@pytest.mark.parametrize("weights", [{}, {"class_weight": 0}, {"class_weight": 0, "patch_weight": 0}])
def test_it_shares_the_statistics_of_the_patches(second, weights):
    method = randomised(FM(second.student, second.teacher, **options(standardise="channel", **weights)))
    student, teacher, targets = second.second(9)
    method.observe(teacher)
    method.freeze()
    assert "masked" in method(student, teacher, targets) and "masked" not in method.targets
    assert "patch" in method.targets


def test_without_it_the_student_runs_once(second):
    method = randomised(FM(second.student, second.teacher, standardise="none"))
    assert not method.needs_again and set(method(*second.second())) == {"class", "patch"} and not second.seen


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"mask_ratio": 0.3}, "mask_ratio is 0.3 and nothing is masked; set masked_weight, or remove it"),
        ({"masked_weight": 1.0, "mask_ratio": 0.0}, "mask_ratio is 0 and must be above 0 and below 1"),
        ({"masked_weight": 1.0, "mask_ratio": 1.0}, "mask_ratio is 1 and must be above 0 and below 1"),
        ({"masked_weight": -1.0}, "masked_weight is -1.0; none may be negative"),
    ],
)
def test_rejected_options(second, chosen, message):
    with pytest.raises(ValueError, match=message):
        FM(second.student, second.teacher, **chosen)


def test_images_that_do_not_divide_into_the_grid(second):
    with pytest.raises(ValueError, match=r"13x8 pixels do not into 3x2; change data.image_size or teacher.image_size"):
        FM(replace(second.student, image=(3, 13, 8)), second.teacher, masked_weight=1.0)


# ---------------------------------------------------------------- in a step

LOSSES = {"fm": {"masked_weight": 1.0, "standardise": "none", "hidden": 0}}


def distiller(student, losses=LOSSES):
    teacher = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, embed_dim=32, num_heads=2)
    return Distiller(student, teacher, losses, image_size=(64, 64))


def test_a_step_runs_the_student_twice():
    student = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, embed_dim=24, num_heads=2, num_classes=0)
    built, seen = distiller(student), []
    student.patch_embed.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    losses = built(torch.rand(2, 3, 64, 64), torch.zeros(0, dtype=torch.long))
    losses["total"].backward()
    assert set(losses) == {"fm.class", "fm.patch", "fm.masked", "total"} and len(seen) == 2
    assert (seen[0] != seen[1]).any(dim=1).sum().item() == 2 * 5 * 16 * 16  # 0.3 of 16 cells
    assert all(p.grad is not None for p in built.parameters())


def test_a_student_with_batch_norms_is_refused():
    with pytest.raises(
        UserError,
        match=r"losses.fm: it runs the student again.*statistics of the batch norms of .*resnet.*masked_weight=0",
    ):
        distiller(timm.create_model("test_resnet", num_classes=0))


def test_two_teachers_hide_different_cells():
    student = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, embed_dim=24, num_heads=2, num_classes=0)
    teachers = {
        name: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, embed_dim=32, num_heads=2)
        for name in "ab"
    }
    built, seen = Distiller(student, teachers, LOSSES, image_size=(64, 64)), []
    student.patch_embed.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    losses = built(torch.rand(4, 3, 64, 64), torch.zeros(0, dtype=torch.long))
    assert {"fm@a.masked", "fm@b.masked"} < set(losses)
    whole, one, other = seen
    assert ((one != whole) != (other != whole)).any()


class Again(nn.Module):
    """A method on logits that looks at the images from the other side, for labelled images only."""

    needs_again, needs_targets, needs_maps, needs_teacher = True, True, False, False

    def __init__(self, student, teacher):
        super().__init__()

    def forward(self, student, teacher, targets):
        other = student.again(student.images.flip(3))
        assert len(other.logits) == len(student.logits) == len(targets)
        return {"again": (student.logits - other.logits).square().mean()}


def test_a_method_on_logits_can_run_a_student_without_maps_again():
    student = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=24, num_heads=2, num_classes=3)
    built = Distiller(student, None, {"again": Again}, image_size=(64, 64))
    images = torch.rand(4, 3, 64, 64)
    assert built(images, torch.tensor([0, 2]))["again"] > 0
    images[:2] = (images[:2] + images[:2].flip(3)) / 2
    assert built(images, torch.tensor([0, 2]))["again"].item() == pytest.approx(0, abs=1e-9)
