"""`teacher.precision`: a model held in half precision computes what timm computes in it, and gives others float32."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from scalekd.models.half import DTYPES, hold_in
from scalekd.models.stages import StageView

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def model(name: str) -> torch.nn.Module:
    made = timm.create_model(name, num_classes=7, **({"img_size": 64} if "vit" in name else {})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(0, 0.2, generator=generator)
        for b in made.buffers():
            if b.is_floating_point():
                b.uniform_(0.5, 1.5, generator=generator)
    return made.requires_grad_(False)


def views(name: str, precision: str) -> tuple[StageView, StageView]:
    """The same model in float32 and held in half precision."""
    plain = model(name)
    made = [StageView(m, name=name, image_size=(64, 64)) for m in (plain, copy.deepcopy(plain))]
    hold_in(made[1], precision)
    return made[0], made[1]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.006)])
def test_features_are_those_of_timm_in_half_precision(name, precision, tolerance):
    plain, half = views(name, precision)
    dtype = DTYPES[precision]
    in_float, in_half = plain(IMAGES, classifier=True), half(IMAGES, classifier=True)
    converted = copy.deepcopy(plain.model).to(dtype)
    assert all(p.dtype == dtype for p in half.model.parameters())
    assert torch.equal(in_half.logits, converted(IMAGES.to(dtype)).float())
    assert torch.equal(half(IMAGES, maps=False).logits, in_half.logits)
    assert torch.equal(half.model(IMAGES).float(), in_half.logits)  # as the pre-flight calls it
    pairs = zip([in_half.final, *in_half.maps], [in_float.final, *in_float.maps])
    for ours, wanted in pairs:
        assert ours.dtype == torch.float32
        assert 0 < distance(ours, wanted) < tolerance
    if in_float.classify is not None:
        x = torch.randn(3, in_float.pooled.shape[1], generator=torch.Generator().manual_seed(2), requires_grad=True)
        ours = in_half.classify(x)
        assert ours.dtype == torch.float32 and distance(ours, in_float.classify(x)) < tolerance
        ours.sum().backward()
        assert x.grad.dtype == torch.float32 and x.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_gradients_flow_through_the_last_stage(name):
    plain, half = views(name, "bf16")
    found = []
    for view in (plain, half):
        features = view(IMAGES, resumable=True)
        x = plain(IMAGES).maps[2].repeat(2, 1, 1, 1).clone().requires_grad_()  # two views
        final = features.resume(3, x)
        weights = torch.linspace(-1, 1, final.numel()).view_as(final)
        (final * weights).sum().backward()
        assert final.dtype == x.grad.dtype == torch.float32
        found.append((final.detach(), x.grad))
    for a, b in zip(*found):
        assert 0 < distance(b, a) < 0.06


def test_under_autocast_features_stay_in_half_precision():
    _, half = views("test_vit", "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        features = half(IMAGES, resumable=True)
        assert {features.logits.dtype, *(m.dtype for m in features.maps)} == {torch.bfloat16}
        assert features.resume(3, features.maps[2].float()).dtype == torch.bfloat16
    alone = half(IMAGES)
    assert torch.equal(features.logits.float(), alone.logits)  # autocast is off inside
