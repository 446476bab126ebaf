"""Classifiers that Meta publishes for DINOv2 and DINOv3 in files of their own, on timm's backbones."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scalekd.common.errors import UserError
from scalekd.models.build import build_model
from scalekd.models.class_order import put_in_order
from scalekd.models.options import Model
from scalekd.models.stages import StageView

SMALL = {"depth": 4, "embed_dim": 32, "num_heads": 2}
SIZES = {  # with the tokens in front of the patches
    "vit_small_patch14_dinov2": (56, 1),
    "vit_small_patch14_reg4_dinov2": (56, 5),
    "vit_small_patch16_dinov3": (64, 5),
}
CLASSES = 6


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Layer-scale starts so small that a wrong token would hardly change the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return module.eval()


@pytest.fixture(params=SIZES)
def backbone(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, Model]:
    """A small model of the family with its weights in a file, and the recipe section of a teacher with both files."""
    size, _ = SIZES[request.param]
    model = saved_backbone(tmp_path, request.param, size)
    torch.save(layer(2 * SMALL["embed_dim"]), tmp_path / "linear_head.pth")
    return model, section(request.param, tmp_path)


def saved_backbone(folder: Path, name: str, size: int = 56, classes: int = 0, **kwargs: object) -> nn.Module:
    model = randomised(timm.create_model(name, num_classes=classes, img_size=size, **kwargs or SMALL))
    save_file(model.state_dict(), folder / "backbone.safetensors")
    return model


def layer(width: int, classes: int = CLASSES) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in randomised(nn.Linear(width, classes), 1).named_parameters()}


def section(name: str, folder: Path, head: str = "linear_head.pth", **changes: object) -> Model:
    values = {"weights": str(folder / "backbone.safetensors"), "kwargs": SMALL, "head": str(folder / head)}
    return Model.model_validate({"model": name} | values | changes)


def built(spec: Model, classes: int | None = CLASSES) -> nn.Module:
    size = SIZES.get(spec.model, (64, 0))[0]
    return build_model(spec, channels=3, image_size=(size, size), classes=classes, where="teacher")[0].eval()


def test_logits_are_those_of_the_published_model(backbone: tuple[nn.Module, Model]) -> None:
    """The published code normalises all tokens and reads the class token, then the mean over the patches only."""
    alone, spec = backbone
    size, prefix = SIZES[spec.model]
    images, head = torch.randn(3, 3, size, size), layer(2 * SMALL["embed_dim"])
    with torch.no_grad():
        tokens = alone.forward_features(images)
        assert tokens.shape[1] == prefix + 16
        read = torch.cat([tokens[:, 0], tokens[:, prefix:].sum(dim=1) / 16], dim=1)
        want = read @ head["weight"].T + head["bias"]
        model = built(spec)
        torch.testing.assert_close(model(images), want)
        view = StageView(model, name=spec.model, image_size=(size, size))
        features = view(images, classifier=True)
    assert view.shapes.classes == CLASSES and view.shapes.pooled == 2 * SMALL["embed_dim"]
    torch.testing.assert_close(features.logits, want)
    torch.testing.assert_close(features.pooled, read)
    torch.testing.assert_close(features.final.flatten(2).mT, tokens[:, prefix:])
    assert features.classify is not None and torch.equal(features.classify(features.pooled), features.logits)


def test_its_classes_can_be_put_in_another_order(backbone: tuple[nn.Module, Model]) -> None:
    model, spec = built(backbone[1]), backbone[1]
    size = SIZES[spec.model][0]
    images, ours, theirs = torch.randn(2, 3, size, size), list("abcdef"), list("fabcde")
    with torch.no_grad():
        before = model(images)
        put_in_order(model, theirs, ours, "teacher")
        torch.testing.assert_close(model(images), before[:, [1, 2, 3, 4, 5, 0]])


def test_a_classifier_of_what_the_backbone_pools(tmp_path: Path) -> None:
    name = "vit_small_patch14_dinov2"
    saved_backbone(tmp_path, name)
    save_file(layer(32), tmp_path / "head.safetensors")
    model, images = built(section(name, tmp_path, "head.safetensors")), torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        class_token = model.forward_features(images)[:, 0]
        torch.testing.assert_close(model(images), class_token @ model.head.weight.T + model.head.bias)


def test_it_is_told_with_its_sha256_and_what_it_reads(backbone: tuple[nn.Module, Model]) -> None:
    size = SIZES[backbone[1].model][0]
    _, loaded = build_model(backbone[1], channels=3, image_size=(size, size), classes=CLASSES, where="teacher")
    assert loaded.head.startswith("head linear_head.pth (sha256 ")
    assert loaded.head.endswith("for 6 classes, on the class token and the mean of the patch tokens")


@pytest.mark.parametrize(
    ("contents", "changes", "message"),
    [
        (layer(160), {}, r"reads the class tokens of the last four blocks.*use the classifier of one layer"),
        (layer(48), {}, r"reads 48 numbers; vit_small_patch14_dinov2 has 32 channels.*can read 32 or 64"),
        (layer(64, 7), {}, r"linear_head.pth has 7 classes and the data 6"),
        (layer(64), {"weights": "random"}, r"needs the weights of its backbone; set teacher.weights"),
        ({"weight": torch.zeros(6, 64)}, {}, r"is not one linear layer: it needs a weight \(C, D\) and a bias"),
        ({"weight": torch.zeros(6, 64), "bias": torch.zeros(7)}, {}, r"is not one linear layer"),
        (layer(64) | {"more.weight": torch.zeros(2)}, {}, r"is not one linear layer"),
        (layer(64), {"model": "swin_tiny_patch4_window7_224"}, r"a file works with timm's ViTs"),
        ({0: torch.zeros(6, 64), 1: torch.zeros(6)}, {}, r"is not one linear layer"),
        (layer(64), {"kwargs": SMALL | {"num_classes": 9}}, r"teacher.kwargs: num_classes must be 6"),
        (None, {}, r"teacher.head: .*no file"),
    ],
)
def test_what_is_refused(tmp_path: Path, contents: dict | None, changes: dict, message: str) -> None:
    changes = dict(changes)
    name = changes.pop("model", "vit_small_patch14_dinov2")
    kwargs = {"embed_dim": 32, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]} if "swin" in name else SMALL
    saved_backbone(tmp_path, name, 64 if "swin" in name else 56, **kwargs)
    if contents is not None:
        torch.save(contents, tmp_path / "linear_head.pth")
    with pytest.raises(UserError, match=message):
        built(section(name, tmp_path, **{"kwargs": kwargs} | changes))


def test_the_file_of_a_fitted_head_and_other_endings_are_refused(tmp_path: Path) -> None:
    for name in ("head.safetensors", "head.json", "head.pkl"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"belongs to a fitted head; name its folder, teacher.head={tmp_path}$"):
        built(section("vit_small_patch14_dinov2", tmp_path, "head.safetensors"))
    with pytest.raises(UserError, match=r"head.pkl is a file; a published classifier must end in .safetensors or .pth"):
        built(section("vit_small_patch14_dinov2", tmp_path, "head.pkl"))


def test_a_backbone_file_with_a_classifier_of_its_own_loses_it(tmp_path: Path) -> None:
    name = "vit_small_patch14_dinov2"
    saved_backbone(tmp_path, name, classes=9)
    save_file(layer(64), tmp_path / "head.safetensors")
    model = built(section(name, tmp_path, "head.safetensors"))
    assert torch.equal(model.head.bias, layer(64)["bias"])


def test_an_empty_head_is_none() -> None:
    assert not Model(model="vit_small_patch14_dinov2", head="").has_head_folder
