"""UPerNet on the pyramids of timm's families, and its losses against sums by hand."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import scalekd
from scalekd.common.errors import UserError
from scalekd.models import mixer  # noqa: F401 - adds a name to timm's
from scalekd.transfer.pyramid import Pyramid
from scalekd.transfer.segmentation.model import Segmenter, UPerNet

FAMILIES = {
    "resnet50": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32), "stem_width": 8},
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 16,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 2, 2),
        "img_size": 64,
    },
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "vit_base_patch16_224": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64},
    "mlp_mixer": {"embed_dim": 32, "num_blocks": 2, "img_size": 64},
}


def segmenter(name: str, size: int = 64, classes: int = 3, **kwargs: object) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(timm.create_model(name, **FAMILIES.get(name, {}), **kwargs), (size, size), classes, channels=16)


def batch(size: int = 64, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (2, 3, size, size), generator=generator, dtype=torch.uint8)
    masks = torch.randint(classes, (2, size, size), generator=generator)
    masks[:, :5] = 255
    return images, masks


@pytest.mark.parametrize("name", FAMILIES)
def test_one_step_and_one_evaluation_of_every_family(name):
    module = segmenter(name)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    before = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    losses = module(*batch())
    losses["total"].backward()
    trained = dict(module.named_parameters())
    assert all(trained[n].grad is not None and trained[n].grad.isfinite().all() for n in before)
    backbone = [n for n in before if n.startswith("student.pyramid.backbone.")]
    assert trained[backbone[0]].grad.abs().max() > 0  # down to the first layer
    optimizer.step()
    moved = [n for n in before if not torch.equal(before[n], trained[n])]
    assert len(moved) > 0.9 * len(before) and backbone[0] in moved
    module.eval()
    with torch.no_grad():
        logits = module.student(torch.randn(1, 3, 64, 64))
        assert logits.shape == (1, 3, 64, 64) and logits.isfinite().all()


def test_the_losses_are_means_over_the_pixels_that_count():
    module = segmenter("convnext_tiny").eval()
    images, masks = batch()
    losses = module(images, masks)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (images / 255 - mean) / std
    for term, logits, weight in (
        ("ce", module.student(pixels), 1.0),
        ("auxiliary", module.auxiliary(module.student.pyramid(pixels)[2]), 0.4),
    ):
        logits = F.interpolate(logits, (64, 64), mode="bilinear").double().log_softmax(1)
        picked = [-logits[b, masks[b, y, x], y, x] for b in (0, 1) for y in range(5, 64) for x in range(64)]
        assert losses[term].item() == pytest.approx(weight * torch.stack(picked).mean().item(), rel=1e-5)
    assert losses["total"].item() == pytest.approx(losses["ce"].item() + losses["auxiliary"].item())
    again = module(images.float() / 255, masks.to(torch.uint8))  # floats in [0, 1]; masks as a loader gives them
    assert again["total"].item() == pytest.approx(losses["total"].item())


def test_ignored_pixels_alone_do_no_harm():
    module = segmenter("convnext_tiny")
    images, masks = batch()
    losses = module(images, torch.full_like(masks, 255))
    assert losses["total"].item() == 0
    losses["total"].backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def test_the_student_is_what_is_deployed():
    module = segmenter("convnext_tiny", classes=5)
    assert isinstance(module.student, UPerNet) and isinstance(module.student.pyramid, Pyramid)
    assert not any("auxiliary" in n or "student_" in n for n in module.student.state_dict())
    twin = segmenter("convnext_tiny", classes=5)
    for p in twin.student.parameters():
        nn.init.constant_(p, 0.1)
    twin.student.load_state_dict(module.student.state_dict())
    x = torch.randn(2, 3, 70, 50)  # of another size, and no multiple of 32
    with torch.no_grad():
        outputs = module.student.eval()(x)
        assert outputs.shape == (2, 5, 70, 50) and torch.equal(outputs, twin.student.eval()(x))


def test_the_decoder_reads_all_four_maps():
    student = segmenter("convnext_tiny").student.eval()
    maps = student.pyramid(torch.randn(2, 3, 64, 64))
    for i, m in enumerate(maps):
        changed = [*maps[:i], torch.randn_like(m), *maps[i + 1 :]]
        size = torch.Size((64, 64))
        assert not torch.allclose(student.from_maps(maps, size), student.from_maps(changed, size))


def test_a_grey_model_and_given_statistics():
    module = segmenter("convnext_tiny", in_chans=1)
    assert module.student_mean.shape == (1, 1, 1, 1)
    images, masks = batch()
    assert module(images[:, :1], masks)["total"].isfinite()
    model = timm.create_model("convnext_tiny", **FAMILIES["convnext_tiny"])
    given = Segmenter(model, (64, 64), 3, 16, statistics=((0.5,) * 3, (0.25,) * 3))
    assert given.student_std.flatten().tolist() == [0.25] * 3


def test_one_image_cannot_be_trained_on_alone():
    module = segmenter("convnext_tiny")
    images, masks = batch()
    with pytest.raises(UserError, match=r"raise train\.batch_size"):
        module(images[:1], masks[:1])
    assert module.eval()(images[:1], masks[:1])["total"].isfinite()


def test_it_learns_a_batch_by_heart():
    torch.manual_seed(0)
    images = F.avg_pool2d(torch.rand(2, 1, 32, 32), 9, 1, 4).expand(-1, 3, -1, -1)
    masks = (images[:, 0] > images.mean()).long()  # what is bright is class 1
    model = timm.create_model("convnext_tiny", **FAMILIES["convnext_tiny"])
    module = Segmenter(model, (32, 32), 2, channels=16)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        terms = module(images, masks)
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        losses.append(terms["ce"].item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_missing_extra_is_named(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("segmentation_models_pytorch")]:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(UserError, match=re.escape("pip install 'scalekd[segmentation]'")):
        segmenter("convnext_tiny")


def test_nothing_imports_the_extra_before_it_is_needed():
    def imported(node: ast.AST) -> list[str]:
        return [a.name for a in getattr(node, "names", [])] + [getattr(node, "module", None) or ""]

    package = Path(scalekd.__file__).parent
    for file in package.rglob("*.py"):
        text = file.read_text()
        if "segmentation_models_pytorch" in text:  # in functions alone
            top = [n for n in ast.parse(text).body if isinstance(n, (ast.Import, ast.ImportFrom))]
            assert not any(name.startswith("segmentation_models_pytorch") for n in top for name in imported(n)), file
