"""A frozen teacher beside the backbone of a detector or segmenter: its loss, and that it is not in what is deployed."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from scalekd.common.errors import UserError
from scalekd.models.stages import StageView
from scalekd.transfer.build import make_optimizer
from scalekd.transfer.config import Detection, LoopTeacher
from scalekd.transfer.detection.model import Detector
from scalekd.transfer.pyramid import Pyramid
from scalekd.transfer.segmentation.model import Segmenter
from scalekd.transfer.teacher import TeacherTerm, area_shares, build_teacher

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
SIZE = (48, 64)  # 3x4 patches
CHANNELS = 6


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Noise on all parameters: fresh layer norms and biases would hide mistakes."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=noise)
    return module


def term(projector: str = "linear", weight: float = 1.0, channels: int = CHANNELS) -> TeacherTerm:
    torch.manual_seed(0)
    model = randomised(timm.create_model("test_vit", img_size=SIZE, depth=4))
    view = StageView(model, name="test_vit", image_size=SIZE)
    made = TeacherTerm(view, SIZE, (MEAN, STD), channels, 32, projector, weight)
    randomised(made.projector, seed=1)
    return made


def images() -> list[torch.Tensor]:
    """Of 80x100 and 40x64 pixels."""
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(3, *size, generator=generator) for size in ((80, 100), (40, 64))]


def coarse() -> torch.Tensor:
    """The map of the padded batch of 96x128 pixels."""
    return torch.randn(2, CHANNELS, 3, 4, generator=torch.Generator().manual_seed(3))


def test_the_share_of_each_cell_by_hand():
    # 80 pixels in two positions of 40: 32 and 8 pixels of the cells 0 and 1, then 24 and 16 of 1 and 2; 3 is padding
    expected = torch.tensor([[0.8, 0.2, 0.0, 0.0], [0.0, 0.6, 0.4, 0.0]])
    torch.testing.assert_close(area_shares(80, 32, 4, 2), expected)
    # three positions of 16 pixels on cells of 32
    torch.testing.assert_close(area_shares(48, 32, 2, 3), torch.tensor([[1.0, 0], [1, 0], [0, 1]]))


def test_the_teacher_sees_the_pixels_in_its_own_size_mean_and_std():
    taught, given = term(), images()
    pixels = torch.cat([F.interpolate(i[None], SIZE, mode="bicubic", antialias=True).clamp(0, 1) for i in given])
    x = (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    with torch.no_grad():
        tokens = taught.view.model.forward_features(x)[:, taught.view.model.num_prefix_tokens :]
    torch.testing.assert_close(taught.see(given), tokens.transpose(1, 2).unflatten(2, (3, 4)))


def test_the_loss_pixel_by_pixel():
    """Both maps are enlarged to pixels, where the student's is averaged over each patch of the teacher."""
    taught, given, maps = term(weight=0.5), images(), coarse()
    weight, bias = (taught.projector[1].get_parameter(n).detach().double().numpy() for n in ("weight", "bias"))
    target = taught.see(given).double().numpy()
    losses = []
    for i, (height, width) in enumerate(((80, 100), (40, 64))):
        pixels = maps[i].double().numpy().repeat(32, 1).repeat(32, 2)[:, :height, :width]
        fine = pixels.repeat(3, 1).repeat(4, 2)  # so that patches are whole numbers of these
        patches = fine.reshape(CHANNELS, 3, height, 4, width).mean((2, 4))
        projected = np.einsum("dc,cij->dij", weight[:, :, 0, 0], patches) + bias[:, None, None]
        dot = (projected * target[i]).sum(0)
        losses.append(1 - dot / np.linalg.norm(projected, axis=0) / np.linalg.norm(target[i], axis=0))
    assert taught(given, maps).item() == pytest.approx(0.5 * np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("projector", ["linear", "mlp", "cap"])
def test_padding_is_not_taught_and_all_of_the_projector_learns(projector):
    taught, given, maps = term(projector), images(), coarse().requires_grad_()
    loss = taught(given, maps)
    loss.backward()
    reached = maps.grad.abs().sum(1) > 0
    # 40x64 pixels are 2x2 cells; the other cells of the second image are padding
    assert reached[0].all() and reached[1, :2, :2].all() and reached[1].sum() == 4
    assert [name for name, p in taught.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None for p in taught.view.model.parameters())
    with torch.no_grad():
        changed = maps.clone()
        changed[1, :, 2:] = 9.0
        assert torch.equal(taught(given, changed), loss)
        changed[1, :, 1] = 9.0
        assert not torch.equal(taught(given, changed), loss)


def test_two_halves_of_a_batch_are_its_whole():
    """So two processes, whose gradients are averaged, learn what one does."""
    taught, given, maps = term("mlp"), images(), coarse()
    halves = [taught(given[i : i + 1], maps[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(sum(halves) / 2, taught(given, maps))


def detector(kind: str, taught: bool) -> Detector:
    torch.manual_seed(0)
    pyramid = Pyramid(timm.create_model("test_resnet"), (64, 64), 4 if kind == "mask-rcnn" else 8)
    options = {"short": 64, "long": 96, "regions": 8, "proposals": (16, 8), "width": 16, "anchors": (8, 16, 32, 48, 64)}
    model = Detector(pyramid, 2, MEAN, STD, kind=kind, **options)
    if taught:
        model.teacher = term("mlp", channels=pyramid.channels[-1])
    return model


@pytest.mark.parametrize("kind", ["mask-rcnn", "retinanet"])
def test_what_is_deployed_has_no_teacher(kind):
    alone, taught = detector(kind, False), detector(kind, True)
    assert taught.student.state_dict().keys() == alone.student.state_dict().keys()
    assert not [name for name in taught.state_dict() if "projector" not in name and not name.startswith("student.")]
    projector = {name for name, _ in taught.named_parameters()} - {name for name, _ in alone.named_parameters()}
    assert projector and all(name.startswith("teacher.projector.") for name in projector)
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    heads = [m.student.roi_heads if kind == "mask-rcnn" else m.student for m in (alone, taught)]
    for head in heads:
        head.score_thresh = 0.0
    with torch.no_grad():
        one, other = (model.eval()([image])[0] for model in (alone, taught))
    assert len(one["scores"]) and one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", ["mask-rcnn", "retinanet"])
def test_a_detector_learns_from_the_teacher_too(kind):
    pixels = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((64, 64), (50, 90))]
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 8:40, 8:40] = 1
    box = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}
    targets = [box | {"masks": masks}, box | {"masks": F.pad(masks, (0, 26))[:, :50]}]
    model = detector(kind, True).train()
    frozen = {name: value.clone() for name, value in model.teacher.view.model.state_dict().items()}
    seen = []
    model.student.backbone.pyramid.register_forward_hook(lambda module, given, maps: seen.append(maps[-1]))
    terms = model(pixels, targets)
    expected = model.teacher([p / 255 for p in pixels], seen[0])
    assert terms["teacher"] == expected > 0
    assert terms["total"].item() == pytest.approx(sum(v.item() for k, v in terms.items() if k != "total"), rel=1e-5)
    (gradient,) = torch.autograd.grad(terms["teacher"], model.backbone.conv1[0].weight)
    assert gradient.any()
    assert not model.teacher.view.model.training
    assert all(torch.equal(value, frozen[name]) for name, value in model.teacher.view.model.state_dict().items())


def test_the_teacher_moves_with_the_model():
    model = detector("retinanet", True).to(torch.float64)
    assert {p.dtype for p in model.teacher.view.model.parameters()} == {torch.float64}
    assert model.teacher.mean.dtype == torch.float64


def test_a_segmenter_s_teacher_does_not_see_what_fills_up_a_crop():
    torch.manual_seed(0)
    model = Segmenter(timm.create_model("test_resnet"), (64, 64), 3, 16, (MEAN, STD)).train()
    seen = []

    class Recorder(nn.Module):
        def forward(self, images, maps):
            seen.extend(images)
            return maps.mean()

    model.teacher = Recorder()
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    masks = torch.randint(0, 3, (3, 64, 64), dtype=torch.uint8)
    fill = (255 * torch.tensor(MEAN)).round().to(torch.uint8).view(3, 1, 1)
    pixels[1, :, 40:], masks[1, 40:] = fill, 255
    pixels[1, :, :, 50:], masks[1, :, 50:] = fill, 255
    masks[2, 30:] = 255  # pixels without a class are no filling
    assert "teacher" in model(pixels, masks)
    assert [tuple(image.shape) for image in seen] == [(3, 64, 64), (3, 40, 50), (3, 64, 64)]
    assert torch.equal(seen[1], pixels[1, :, :40, :50] / 255)


def test_each_part_has_its_learning_rate():
    model = detector("retinanet", True)
    values = {
        "name": "x",
        "data": {"annotations": "a", "images": "a", "val_annotations": "a", "val_images": "a"},
        "backbone": {"model": "test_resnet", "weights": "pretrained"},
        "teacher": {"model": "test_vit", "weights": "pretrained", "lr_scale": 4.0},
        "train": {"epochs": 1, "batch_size": 2},
        "optim": {"lr": 1e-3, "stage_decay": 0.5, "backbone_scale": 0.1},
    }
    config = Detection.model_validate(values)
    groups = make_optimizer(model, model.backbone, model.teacher, config).param_groups
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(rates) == sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    for part, wanted in (
        (model.teacher.projector[0].weight, (4e-3, 0.05)),
        (model.teacher.projector[0].bias, (4e-3, 0.0)),
        (model.student.head.regression_head.bbox_reg.weight, (1e-3, 0.05)),
        (model.backbone.layer4[0].conv1.weight, (1e-3 * 0.1 * 0.5, 0.05)),
        (model.backbone.conv1[0].weight, (1e-3 * 0.1 * 0.5**5, 0.05)),
    ):
        assert rates[id(part)] == pytest.approx(wanted)
    values["schedule"] = {"min_lr": 1e-5}
    values["teacher"]["lr_scale"] = 1e-4
    with pytest.raises(UserError, match=r"min_lr 1e-05 is above the learning rate of the projector, 1e-07"):
        make_optimizer(model, model.backbone, model.teacher, Detection.model_validate(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "shvit_s1"}, r"teacher.model: shvit_s1 .*no stage maps.* Use a ViT"),
        ({"kwargs": {"no_such": 1}}, "teacher.*no_such"),
        (
            {"image_size": 40, "kwargs": {"dynamic_img_size": True}},
            r"at 40x40: .*Set teacher.image_size to a size that",
        ),
        ({"image_size": 16, "projector": "cap"}, "cap needs several positions; raise teacher.image_size"),
        ({"mean": (0.5,)}, r"teacher.mean has 1 values, but data.channels is 3"),
    ],
)
def test_a_teacher_that_cannot_teach(changes, message):
    spec = LoopTeacher.model_validate({"model": "test_vit", "weights": "random"} | changes)
    pyramid = Pyramid(timm.create_model("test_resnet"), (64, 64))
    with pytest.raises(UserError, match=message):
        build_teacher(spec, 3, pyramid)
