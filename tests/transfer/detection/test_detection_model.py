"""Mask R-CNN on the papers' students: a training and an evaluation step, and what happens around them."""

from __future__ import annotations

import pytest
import timm
import torch
from torchvision.ops import box_iou

from scalekd.common.errors import UserError
from scalekd.transfer.decay import layer_groups
from scalekd.transfer.detection.model import FINEST, Detector
from scalekd.transfer.pyramid import Pyramid, any_size_kwargs

# few boxes, to save time
SMALL = {"short": 64, "long": 96, "regions": 12, "proposals": (24, 8)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def detector(name: str, size: int = 64, classes: int = 3, **options) -> Detector:
    torch.manual_seed(0)
    kwargs = {"img_size": size} if name.startswith("mixer") else any_size_kwargs(name)
    pyramid = Pyramid(timm.create_model(name, **kwargs), (size, size), FINEST[options.get("kind", "mask-rcnn")])
    model = Detector(pyramid, classes, MEAN, STD, **(SMALL | options))
    heads = model.student.roi_heads if model.has_masks else model.student
    heads.detections_per_img = 4
    return model


def image(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def target(height: int, width: int, objects: int = 1) -> dict[str, torch.Tensor]:
    masks = torch.zeros(objects, height, width, dtype=torch.uint8)
    masks[:, 4:40, 8:32] = 1
    boxes = torch.tensor([[8.0, 4, 32, 40]]).repeat(objects, 1)
    return {"boxes": boxes, "labels": torch.full((objects,), 2), "masks": masks, "picture": torch.tensor(5)}


def check_prediction(found: dict[str, torch.Tensor], height: int, width: int, classes: int) -> None:
    count = len(found["scores"])
    assert found["boxes"].shape == (count, 4) and found["masks"].shape == (count, 1, height, width)
    assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([width, height, width, height])).all()
    assert ((found["labels"] >= 1) & (found["labels"] <= classes)).all()


@pytest.mark.usefixtures("cheap_initial_values")
@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("resnet50", "conv1.weight"),
        ("swin_tiny_patch4_window7_224", "patch_embed.proj.weight"),
        ("convnext_tiny", "stem.0.weight"),
        ("vit_base_patch16_224", "patch_embed.proj.weight"),
        ("mixer_s16_224", "stem.proj.weight"),
    ],
)
def test_one_training_and_one_evaluation_step(name, first):
    model = detector(name).train()
    images, targets = [image(64, 64), image(50, 60)], [target(64, 64, 2), target(50, 60)]
    terms = model(images, targets)
    assert set(terms) == {"rpn_class", "rpn_box", "class", "box", "mask", "total"}
    parts = [float(value.detach()) for name, value in terms.items() if name != "total"]
    assert float(terms["total"].detach()) == pytest.approx(sum(parts), rel=1e-5) and all(part > 0 for part in parts)
    terms["total"].backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert model.backbone.get_parameter(first).grad.abs().sum() > 0

    with torch.no_grad():
        model.student.roi_heads.score_thresh = 0.0  # untrained: nothing is sure
        first_found, second_found = model.eval()([image(64, 64), image(100, 50)])
    check_prediction(first_found, 64, 64, 3)
    check_prediction(second_found, 100, 50, 3)
    assert len(first_found["scores"]) > 0 and len(second_found["scores"]) > 0


def test_images_without_objects_can_be_trained_on():
    model = detector("test_resnet").train()
    terms = model([image(64, 64)], [target(64, 64, 0)])
    assert terms["total"].isfinite() and terms["mask"] == terms["box"] == 0
    terms["total"].backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


def test_pixels_are_normalised_and_training_images_are_not_resized():
    model = detector("test_resnet", short=96, long=128)
    seen: list[torch.Tensor] = []
    model.student.backbone.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    pixels = torch.full((3, 40, 64), 255, dtype=torch.uint8)
    wanted = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    model.train()([pixels], [target(40, 64)])
    assert seen[0].shape == (1, 3, 64, 64)  # padded to whole strides
    torch.testing.assert_close(seen[0][0, :, :40].mean((1, 2)), wanted)
    assert not seen[0][0, :, 40:].any()
    model.eval()([pixels])
    assert seen[1].shape == (1, 3, 96, 128)  # 80 x 128: the long side decides


def test_batch_norms_keep_their_statistics_unless_told():
    for freeze in (True, False):
        model = detector("test_resnet", freeze_norms=freeze).train()
        before = model.backbone.bn1.running_mean.clone()
        model([image(64, 64)], [target(64, 64)])["total"].backward()
        assert torch.equal(model.backbone.bn1.running_mean, before) == freeze
        assert model.backbone.bn1.weight.grad is not None  # trained in both


def test_a_backbone_of_one_size_sets_the_size_of_images():
    model = detector("mixer_s16_224", size=80)
    assert model.limit == 64 and detector("test_resnet").limit is None  # 80 is no whole number of strides of 32
    with torch.no_grad():
        (found,) = model.eval()([image(200, 90)])
    check_prediction(found, 200, 90, 3)
    with pytest.raises(UserError, match=r"MlpMixer only accepts 80x80 pixels, not 96x64"):
        model.train()([image(90, 64)], [target(90, 64)])
    with pytest.raises(UserError, match=r"too small for a detector"):
        detector("mixer_s16_224", size=16)


def test_every_parameter_is_in_one_group_and_what_is_deployed_holds_all():
    model = detector("test_resnet")
    groups = layer_groups(model.backbone, model.parameters(), lr=1.0, weight_decay=0.05, stage_decay=0.7)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(p) for p in model.parameters()}
    assert {g["name"]: g["lr"] for g in groups}["rest"] == 1.0
    assert {id(p) for p in model.student.parameters()} == set(grouped)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lr", "steps"), [("mask-rcnn", 1e-3, 60), ("retinanet", 2e-3, 120)])
def test_it_learns_where_a_square_is(kind, lr, steps):
    options = {"anchors": (16, 32, 64, 128, 256), "freeze_norms": False, "width": 64}
    model = detector("test_resnet", classes=1, kind=kind, **options).train()
    pixels = torch.zeros(3, 64, 64, dtype=torch.uint8)
    pixels[:, 10:42, 20:52] = 255
    wanted = {
        "boxes": torch.tensor([[20.0, 10, 52, 42]]),
        "labels": torch.tensor([1]),
        "masks": (pixels[:1] > 0).byte(),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model([pixels], [wanted])["total"].backward()
        optimizer.step()
    model.freeze_norms = True
    with torch.no_grad():
        (found,) = model.train().student.eval()([pixels / 255])
    assert box_iou(found["boxes"][:1], wanted["boxes"]).item() > 0.7
