"""Our losses and gradients beside benchmarks/literal.py, the paper word for word: what is fast changes no result."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import scipy.fft
import timm
import torch

from scalekd.distill.distiller import Distiller
from scalekd.methods.distance import normalized_distance, remove_direct

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import literal

SIZE = (64, 96)  # grids that are not square
SWIN = {"img_size": SIZE, "window_size": 2, "embed_dim": 16, "depths": (1, 1, 1, 2), "num_heads": (1, 2, 2, 4)}
VIT = {"img_size": SIZE, "patch_size": 16, "embed_dim": 32, "depth": 6, "num_heads": 2, "class_token": True}
TEACHERS = {"swin": ("swin_tiny_patch4_window7_224", SWIN, (2, 4)), "vit": ("vit_tiny_patch16_224", VIT, (2, 4))}


def pair_of_distillers(teacher: str, dtype: torch.dtype) -> tuple[Distiller, Distiller, torch.Tensor, torch.Tensor]:
    """Ours and the literal one, with the same models and parameters, all of them random; images and labels."""
    torch.manual_seed(0)
    name, kwargs, heads = TEACHERS[teacher]
    student, model = timm.create_model("test_resnet", num_classes=5), timm.create_model(name, num_classes=5, **kwargs)
    task = {"ce": {}, "kd": {}}
    both = [
        Distiller(student, model, task | losses, image_size=SIZE)
        for losses in (
            {"scalekd": {"heads": heads, "shared": False, "expansion": 4}},
            {"scalekd": partial(literal.LiteralScaleKD, heads=heads)},
        )
    ]
    for p in (*model.parameters(), *both[0].parameters()):
        torch.nn.init.normal_(p, std=0.3)
    both[1].methods.load_state_dict(both[0].methods.state_dict())
    for distiller in both:
        distiller.to(dtype).train()
    return both[0], both[1], torch.rand(3, 3, *SIZE, dtype=dtype), torch.tensor([0, 3, 1])


def losses_and_gradients(distiller, pixels, targets):
    terms = distiller(pixels, targets)
    terms["total"].backward()
    gradients = {name: p.grad for name, p in distiller.named_parameters()}
    distiller.zero_grad()
    return terms, gradients


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_step_equals_the_paper_word_for_word(teacher):
    """In float64, where next to nothing but the formula is left."""
    ours, theirs, pixels, targets = pair_of_distillers(teacher, torch.float64)
    terms, gradients = losses_and_gradients(ours, pixels, targets)
    expected, by_literal = losses_and_gradients(theirs, pixels, targets)
    assert terms.keys() == expected.keys() and len(terms) == 7
    for name, value in terms.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-11), name
    assert gradients.keys() == by_literal.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, by_literal[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_in_float32_only_rounding_tells_them_apart(teacher):
    ours, theirs, pixels, targets = pair_of_distillers(teacher, torch.float32)
    terms, gradients = losses_and_gradients(ours, pixels, targets)
    expected, by_literal = losses_and_gradients(theirs, pixels, targets)
    for name, value in terms.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-5), name
    a, b = (torch.cat([g.flatten() for g in of.values()]) for of in (gradients, by_literal))
    assert (a - b).norm() <= 1e-3 * b.norm()


@pytest.mark.parametrize("grid", [7, 14, 28])
def test_the_loss_part_equals_a_dct(grid):
    torch.manual_seed(0)
    made = (torch.randn(2, 16, grid, grid) + torch.randn(16, 1, 1)).requires_grad_()
    target = torch.randn(2, 16, grid, grid) + torch.randn(16, 1, 1)
    fast = normalized_distance(remove_direct(made), remove_direct(target), "mean")
    slow = literal.distance(literal.phi(made), literal.phi(target))
    assert fast.item() == pytest.approx(slow.item(), rel=1e-6)
    by_fast, by_slow = (torch.autograd.grad(loss, made)[0] for loss in (fast, slow))
    assert (by_fast - by_slow).norm() <= 1e-5 * by_slow.norm()


def test_the_literal_dct_is_scipys():
    x = torch.randn(2, 3, 4, 7, dtype=torch.float64)
    z = scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho")
    z[:, :, 0, 0] = 0
    expected = torch.from_numpy(scipy.fft.idctn(z, axes=(2, 3), norm="ortho"))
    torch.testing.assert_close(literal.phi(x), expected, rtol=1e-12, atol=1e-12)
