"""The `-released` recipes beside the release's own step, written down in released_literal.py."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from scalekd.config.recipe import load_recipe
from scalekd.config.recipe_files import recipe_names
from scalekd.distill.distiller import Distiller

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from released_literal import Released, step

SIZE = (64, 64)
SWIN = {"img_size": SIZE, "window_size": 2, "embed_dim": 12, "depths": (1, 1, 1, 2), "num_heads": (1, 2, 2, 4)}
# BEiT-L is a ViT with a norm after the pooling; here without a class token, which goes along our proxy path only
BEIT = {"img_size": SIZE, "embed_dim": 24, "depth": 4, "num_heads": 2, "class_token": False}
NORMAL, FIRST, BEIT_L = (0.08, 0.06), (0.08, 0.0), (0.016, 0.008)
RELEASED = {  # recipe: its values in the release, and what makes its student small
    "swin-l-resnet50-advanced": (
        Released("bce", True, (16, 24), NORMAL, NORMAL, 5.0, "layer3", "layer4"),
        {"layers": (1, 1, 1, 1), "channels": (4, 4, 4, 4)},
    ),
    "swin-s-resnet50-traditional": (
        Released("ce", False, (3, 6), NORMAL, FIRST, 5.0, "layer3", "layer4"),
        {"layers": (1, 1, 1, 1), "channels": (4, 4, 4, 4)},
    ),
    "swin-l-vit-small-advanced": (
        Released("smooth", True, (8, 8), NORMAL, NORMAL, 5.0, "blocks.8", "norm"),
        {"img_size": SIZE, "embed_dim": 16, "num_heads": 2},
    ),
    "swin-l-mixer-s-advanced": (
        Released("ce", True, (8, 8), NORMAL, NORMAL, 5.0, "blocks.5", "blocks.7"),
        {"img_size": SIZE},
    ),
    "swin-l-mobilenetv1-advanced": (
        Released("smooth", True, (16, 24), NORMAL, NORMAL, 5.0, "blocks.3", "blocks.4"),
        {},
    ),
    "swin-l-convnext-tiny-advanced": (
        Released("smooth", True, (8, 16), NORMAL, NORMAL, 1.0, "stages.2", "norm_pre"),
        {"depths": (1, 1, 1, 1), "dims": (4, 8, 8, 16), "drop_path_rate": 0.0},
    ),
    "beit-l-resnet50-advanced": (
        Released("bce", True, (8, 8), BEIT_L, BEIT_L, 0.2, "layer3", "layer4", ("blocks.2", "blocks.3")),
        {"layers": (1, 1, 1, 1), "channels": (4, 4, 4, 4)},
    ),
}


def pair_of(name: str, small: dict[str, Any]) -> tuple[Any, Distiller]:
    """The recipe, and its distiller with a small student and teacher in float64, all parameters random."""
    torch.manual_seed(0)
    config = load_recipe(name)
    student = timm.create_model(config.student.model, num_classes=5, **config.student.kwargs | small)
    if "beit-l" in name:
        teacher = timm.create_model("vit_base_patch16_224", num_classes=5, global_pool="avg", **BEIT)
    else:
        teacher = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **SWIN)
    losses = copy.deepcopy(config.losses)
    distiller = Distiller(student, teacher, losses, image_size=SIZE, student_cuts=config.student.cuts).double().train()
    for p in (*teacher.parameters(), *distiller.parameters()):
        torch.nn.init.normal_(p, std=0.3)
    return config, distiller


@pytest.mark.parametrize("row", RELEASED)
def test_a_step_equals_the_release(row):
    """With copied weights, the total to 1e-6 and the student's gradients."""
    released, small = RELEASED[row]
    _, distiller = pair_of(f"imagenet-{row}-released", small)
    pixels, targets = torch.rand(3, 3, *SIZE, dtype=torch.float64), torch.tensor([0, 3, 1])
    teacher = distiller.teacher_view.model
    images = (
        (pixels - distiller.student_mean) / distiller.student_std,
        (pixels - distiller.teacher_mean) / distiller.teacher_std,
    )
    ours = distiller(pixels, targets)["total"]
    theirs = step(released, distiller.student, teacher, distiller.methods["scalekd"], images, targets)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    parameters = [p for p in distiller.student.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(total, parameters, allow_unused=True) for total in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 1e-6 * b.norm() + 1e-12


@pytest.mark.parametrize(
    ("row", "option", "value"),
    [
        ("swin-l-convnext-tiny-advanced", "attention_scale", 5.0),
        ("swin-l-mixer-s-advanced", "student_norm", True),
        ("swin-s-resnet50-traditional", "student_views", "both"),
        ("swin-l-vit-small-advanced", "beta", 0.571),
        ("beit-l-resnet50-advanced", "teacher_norm", True),
    ],
)
def test_every_option_is_needed(row, option, value):
    """With the default of one option the recipe no longer equals the release."""
    _, small = RELEASED[row]
    config, distiller = pair_of(f"imagenet-{row}-released", small)
    losses = copy.deepcopy(config.losses)
    losses["scalekd"][option] = value
    other = Distiller(
        distiller.student, distiller.teacher_view.model, losses, image_size=SIZE, student_cuts=config.student.cuts
    ).double()
    missing = other.methods.load_state_dict(distiller.methods.state_dict(), strict=False).missing_keys
    pixels, targets = torch.rand(3, 3, *SIZE, dtype=torch.float64), torch.tensor([0, 3, 1])
    totals = [d.train()(pixels, targets)["total"].item() for d in (distiller, other)]
    assert missing or totals[0] != pytest.approx(totals[1], rel=1e-5)


def test_there_is_a_recipe_for_every_released_configuration():
    released = {name.removesuffix("-released") for name in recipe_names() if name.endswith("-released")}
    assert len(released) == 16 and released < set(recipe_names())
    assert {f"imagenet-{row}" for row in RELEASED} < released
