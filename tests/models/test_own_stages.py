"""A module with the protocol `OwnStages` is the teacher that a timm model is which computes the same."""

from __future__ import annotations

import doctest
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from test_stages import randomise
from torch import Tensor, nn

from scalekd.common.errors import UserError
from scalekd.distill.distiller import Distiller
from scalekd.models import own_stages
from scalekd.models.stages import Features, StageView

SIZE = (48, 48)


class Own(nn.Module):
    """A ViT of timm behind the protocol, computed with its blocks."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def stage_features(self, images: Tensor) -> Features:
        x = self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(images)))
        maps, prefix = [], []
        for block in self.vit.blocks:
            x = block(x)
            maps.append(self.as_map(x))
            prefix.append(x[:, :1])
        x = self.vit.norm(x)
        return Features(
            self.vit.head(x[:, 0]), tuple(maps), self.as_map(x), tuple(prefix), pooled=x[:, 0], classify=self.vit.head
        )

    def resume_stage(self, k: int, x: Tensor, prefix: Tensor | None, end: bool) -> Tensor:
        x = torch.cat([prefix, x.flatten(2).mT], dim=1)
        for block in self.vit.blocks[k:]:
            x = block(x)
        return self.as_map(self.vit.norm(x) if end else x)

    def as_map(self, x: Tensor) -> Tensor:
        return x[:, 1:].mT.unflatten(2, (3, 3))


def vit(classes: int = 5) -> Any:
    return randomise(timm.create_model("test_vit", num_classes=classes, img_size=48, depth=4), SIZE)


def test_it_is_the_timm_model() -> None:
    model = vit()
    theirs, ours = (StageView(m, name="m", image_size=SIZE) for m in (model, Own(model).eval()))
    assert ours.shapes == theirs.shapes
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        assert torch.equal(ours(images, maps=False).logits, theirs(images, maps=False).logits)
        a, b = (view(images, resumable=True, classifier=True) for view in (ours, theirs))
        for name in ("logits", "final", "pooled"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name))
        for k in (1, 2, 3):
            torch.testing.assert_close(a.maps[k], b.maps[k])
            assert torch.equal(a.resume(k, a.maps[k - 1]), a.final)
            assert torch.equal(a.resume(k, a.maps[k - 1], end=False), a.maps[3])
    assert ours(images).pooled is None


def test_in_a_distiller() -> None:
    model, terms = vit(), []
    images, targets = torch.rand(4, 3, *SIZE), torch.arange(4)
    for teacher in (model, Own(model)):
        torch.manual_seed(0)
        student = timm.create_model("test_resnet", num_classes=5)
        losses = {"kd": {}, "scalekd": {}, "fm": {}, "srrl": {}}
        distiller = Distiller(student, teacher, losses, image_size=SIZE, teacher_stats=((0.5,) * 3, (0.2,) * 3))
        terms.append(distiller.train()(images, targets))
        terms[-1]["total"].backward()
    for name, value in terms[0].items():
        torch.testing.assert_close(terms[1][name], value, rtol=1e-4, atol=1e-5)


class Bare(nn.Module):
    """The same without a classifier, a class token and a tail; `change` breaks the protocol."""

    def __init__(self, **change: Any) -> None:
        super().__init__()
        self.own, self.change = Own(vit()), change

    def stage_features(self, images: Tensor) -> Features:
        whole = self.own.stage_features(images)
        left = {"logits": whole.logits[:, :0], "prefix": (), "pooled": None, "classify": None}
        return replace(whole, **(left | self.change))


def test_what_is_optional_may_be_missing() -> None:
    shapes = StageView(Bare(), name="bare", image_size=SIZE).shapes
    assert (shapes.classes, shapes.pooled, shapes.can_resume) == (0, 0, False)
    student = timm.create_model("test_resnet")
    for losses, message in (
        ({"kd": {}}, "kd: the teacher Bare has no classifier"),
        ({"tpp": {}}, "losses.tpp: .*Bare"),
    ):
        with pytest.raises(UserError, match=message):
            Distiller(student, Bare(), losses, image_size=SIZE)
    assert set(Distiller(student, Bare(), {"fm": {}}, image_size=SIZE)(torch.rand(2, 3, *SIZE), torch.arange(2))) == {
        "fm.class", "fm.patch", "total"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": ()}, "its stage_features gives 0 maps; give four"),
        ({"final": None}, "gives no `final` of the grid of the last map"),
        ({"prefix": (None,)}, "gives tokens of 1 maps"),
        ({"pooled": torch.zeros(1, 2, 3)}, r"gives `pooled`, which must be \(B, P\)"),
        ({"logits": torch.zeros(1)}, "gives logits that are not"),
    ],
)
def test_what_does_not_follow_the_protocol(change: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        Distiller(timm.create_model("test_resnet"), Bare(**change), {"fd": {}}, image_size=SIZE)


def test_the_example() -> None:
    names = {"torch": torch, "Features": Features, "StageView": StageView}
    assert doctest.testmod(own_stages, extraglobs=names).failed == 0
