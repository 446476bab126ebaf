"""`Distiller`: its parameters, the input of each model, and the sum of the terms."""

from __future__ import annotations

import doctest

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd.checks.step import dead_parameters
from scalekd.common.errors import UserError
from scalekd.distill.distiller import Distiller
from scalekd.models.inputs import expect_unit_range
from scalekd.models.stages import Features, Shapes

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.4814, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)  # also EVA's
ALL = {"ce": {}, "kd": {}, "scalekd": {}}


def with_statistics(name: str, statistics: tuple, **kwargs: object) -> nn.Module:
    overlay = dict(zip(("mean", "std"), statistics))
    return timm.create_model(name, num_classes=5, pretrained_cfg_overlay=overlay, **kwargs)


def make(losses: dict = ALL, teacher_size: int = 48, student: nn.Module | None = None, **kwargs: object) -> Distiller:
    torch.manual_seed(0)
    teacher = with_statistics("test_vit", CLIP, depth=4, img_size=teacher_size)
    return Distiller(
        student or with_statistics("test_resnet", IMAGENET),
        teacher,
        losses,
        image_size=(48, 48),
        teacher_size=(teacher_size, teacher_size),
        **kwargs,
    )


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (4, 3, 48, 48), generator=generator, dtype=torch.uint8)
    return images, torch.tensor([0, 1, 2, 4])


def inputs_of(model: nn.Module) -> list[Tensor]:
    """A list to which every forward pass appends the input of the model's first convolution."""
    seen: list[Tensor] = []
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    return seen


# ---------------------------------------------------------------- the teacher


def test_teacher_is_not_part_of_the_module():
    distiller = make()
    teacher = distiller.teacher_view.model
    theirs = {id(t) for t in (*teacher.parameters(), *teacher.buffers())}
    assert not theirs & {id(p) for p in distiller.parameters()}
    assert not theirs & {id(t) for t in distiller.state_dict(keep_vars=True).values()}
    assert not {*teacher.modules()} & {*distiller.modules()}
    assert {name.split(".")[0] for name in distiller.state_dict()} == {"student", "methods"}


def test_teacher_stays_frozen_and_in_eval_mode(batch):
    distiller = make().train()
    teacher = distiller.teacher_view.model
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distiller(*batch)["total"].backward()
    assert distiller.student.training
    assert not any(m.training for m in teacher.modules())
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    "losses", [{"ce": {}, "kd": {}}, {"ce": {}, "scalekd": {}}, {"ce": {}, "at": {}}, {"ce": {}, "srrl": {}}], ids=str
)
@pytest.mark.parametrize("part", ["whole", "one batch norm"])
def test_a_teacher_in_train_mode_is_put_back(losses, part):
    """`train()` of a module that holds the teacher too, as a Lightning module does, and of a part of the teacher."""
    torch.manual_seed(0)
    teacher = timm.create_model("test_resnet", num_classes=5)
    distiller = Distiller(timm.create_model("test_resnet", num_classes=5), teacher, losses, image_size=(64, 64))
    images, targets = torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 4])
    expected = distiller.eval()(images, targets)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    if part == "whole":
        nn.ModuleDict({"distiller": distiller, "teacher": teacher}).train()
        distiller.eval()
    else:
        next(m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)).train()
    for run in (lambda: distiller(images, targets), lambda: distiller.teacher_features(images)):
        if part == "whole":
            teacher.train()
        run()
        assert not any(module.training for module in teacher.modules())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert distiller(images, targets)["total"].item() == expected["total"].item()


def test_teacher_moves_along(batch):
    distiller = make().to(torch.float64)
    assert {p.dtype for p in distiller.teacher_view.model.parameters()} == {torch.float64}
    losses = distiller(batch[0].double() / 255, batch[1])
    assert losses["kd"].dtype == torch.float64


# ---------------------------------------------------------------- what the models see


@pytest.mark.parametrize("pixels_size", [48, 56, 64])
@pytest.mark.parametrize("teacher_size", [48, 64])
def test_same_pixels_under_own_statistics_size_and_interpolation(teacher_size, pixels_size):
    batch = torch.randint(0, 256, (4, 3, pixels_size, pixels_size), dtype=torch.uint8), torch.randint(0, 5, (4,))
    distiller = make(teacher_size=teacher_size)
    distiller.student.pretrained_cfg["interpolation"] = "bilinear"
    student, teacher = inputs_of(distiller.student), inputs_of(distiller.teacher_view.model)
    distiller(*batch)
    pixels = batch[0] / 255

    def expected_at(size, mode):
        if size == pixels_size:
            return pixels
        return F.interpolate(pixels, (size, size), mode=mode, antialias=True).clamp(0, 1)

    of_student, of_teacher = expected_at(48, "bilinear"), expected_at(teacher_size, "bicubic")
    for seen, expected, statistics in ((student, of_student, IMAGENET), (teacher, of_teacher, CLIP)):
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in statistics)
        assert len(seen) == 1
        torch.testing.assert_close(seen[0], (expected - mean) / std)


def test_given_statistics_win(batch):
    distiller = make(student_stats=([0.1] * 3, [0.2] * 3), teacher_stats=([0.3] * 3, [0.4] * 3))
    student, teacher = inputs_of(distiller.student), inputs_of(distiller.teacher_view.model)
    distiller(*batch)
    torch.testing.assert_close(student[0], (batch[0] / 255 - 0.1) / 0.2)
    torch.testing.assert_close(teacher[0], (batch[0] / 255 - 0.3) / 0.4)


def test_uint8_and_float_images_give_the_same_losses(batch):
    distiller = make().eval()
    whole, real = distiller(*batch), distiller(batch[0].float() / 255, batch[1])
    assert whole == real


# ---------------------------------------------------------------- the terms


def test_weights_multiply_and_total_is_the_sum(batch):
    plain = make().eval()(*batch)
    weighted = make({"ce": {"weight": 0.25}, "kd": {"weight": 0.0}, "scalekd": {"weight": 3.0}}).eval()(*batch)
    assert list(plain) == ["ce", "kd", *(f"scalekd.{p}{v}" for v in ("ori", "alt") for p in ("", "proxy_")), "total"]
    for name, value in weighted.items():
        if name != "total":
            factor = {"ce": 0.25, "kd": 0.0}.get(name, 3.0)
            torch.testing.assert_close(value, factor * plain[name])
    for losses in (plain, weighted):
        torch.testing.assert_close(losses["total"], sum(v for name, v in losses.items() if name != "total"))


def test_losses_are_those_computed_by_hand(batch):
    distiller = make({"ce": {"weight": 0.5}, "kd": {"temperature": 2.0, "weight": 3.0}}).eval()
    pixels, targets = batch[0].double() / 255, batch[1]
    logits = []
    for model, statistics in ((distiller.student, IMAGENET), (distiller.teacher_view.model, CLIP)):
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in statistics)
        logits.append(model(((pixels - mean) / std).float()).double())
    student, teacher = logits
    ce = sum(student[i].exp().sum().log() - student[i, t] for i, t in enumerate(targets)) / 4
    p, q = ((x / 2).exp() / (x / 2).exp().sum(1, keepdim=True) for x in (teacher, student))
    kd = 2**2 * (p * (p / q).log()).sum() / 4
    losses = distiller(*batch)
    assert losses["ce"].item() == pytest.approx(0.5 * ce.item(), rel=1e-5)
    assert losses["kd"].item() == pytest.approx(3.0 * kd.item(), rel=1e-4)


class LogitDistance(nn.Module):
    """A method as a user would write one: two terms, one with a parameter."""

    needs_maps = False

    def __init__(self, student: Shapes, teacher: Shapes | None):
        super().__init__()
        assert teacher is not None
        self.linear = nn.Linear(student.classes, teacher.classes)

    def forward(self, student: Features, teacher: Features, targets: Tensor) -> dict[str, Tensor]:
        return {
            "mine": F.mse_loss(self.linear(student.logits), teacher.logits),
            "size": student.logits.square().mean(),
        }


def test_a_method_of_your_own(batch):
    distiller = make({"ce": {}, "mine": LogitDistance})
    losses = distiller(*batch)
    losses["total"].backward()
    assert list(losses) == ["ce", "mine", "mine.size", "total"]
    assert "methods.mine.linear.weight" in distiller.state_dict()
    assert not dead_parameters(distiller)


def test_logit_methods_serve_a_model_without_maps(batch):
    student = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    losses = make({"ce": {}, "kd": {}}, student=student, student_stats=IMAGENET)(*batch)
    assert list(losses) == ["ce", "kd", "total"]
    assert losses["total"].isfinite()
    with pytest.raises(UserError, match=r"losses\.scalekd: .*Sequential"):
        make(ALL, student=student, student_stats=IMAGENET)


def test_without_a_teacher(batch):
    student = with_statistics("test_resnet", IMAGENET)
    distiller = Distiller(student, None, {"ce": {}}, image_size=(48, 48)).eval()
    assert list(distiller(*batch)) == ["ce", "total"]
    with pytest.raises(UserError, match=r"losses\.kd needs a teacher"):
        Distiller(student, None, {"kd": {}}, image_size=(48, 48))


@pytest.mark.parametrize(
    ("losses", "message"),
    [({"kdd": {}}, "unknown method `kdd`.*`kd`"), ({"kd": {"temperature": -1.0}}, r"losses\.kd: .*positive")],
)
def test_bad_losses(losses, message):
    with pytest.raises(UserError, match=message):
        make(losses)


def test_dead_parameters_are_named(batch):
    distiller = make()
    distiller(*batch)["total"].backward()
    assert dead_parameters(distiller) == []
    distiller.student.unused = nn.Parameter(torch.zeros(3))
    distiller.student.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    assert dead_parameters(distiller) == ["student.unused"]


def test_bf16_losses_are_float32_and_close(batch):
    distiller = make().eval()
    exact = distiller(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = distiller(*batch)
    assert rounded["ce"] != exact["ce"]  # bf16 did compute
    for name, value in rounded.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0.05, atol=0.02)


def test_a_grey_model_gets_the_mean_of_the_colours_statistics():
    student = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    distiller = Distiller(student, None, {"ce": {}}, image_size=(32, 32))
    own = timm.data.resolve_model_data_config(student)
    assert distiller.student_mean.shape == (1, 1, 1, 1)
    torch.testing.assert_close(distiller.student_mean.item(), sum(own["mean"]) / 3, rtol=1e-6, atol=0)
    assert distiller(torch.rand(2, 1, 32, 32), torch.tensor([0, 2]))["total"].isfinite()


def test_the_example_in_the_docstring_runs():
    torch.manual_seed(0)
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(Distiller, "Distiller", globs={})
    assert len(example.examples) >= 8
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: (x - torch.tensor(0.45)) / 0.225, "normalised already"),
        (lambda x: 2 * x - 1, "normalised already"),
        (lambda x: 255 * x, "Divide them by 255"),
    ],
)
def test_pixels_that_are_not_in_0_to_1_are_rejected(change, words):
    student = timm.create_model("test_resnet", num_classes=3)
    distiller = Distiller(student, None, {"ce": {}}, image_size=(64, 64))
    pixels, targets = torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    with pytest.raises(UserError, match=words):
        distiller(change(pixels), targets)
    distiller(pixels, targets)


def test_the_pixels_of_the_first_batch_alone_are_checked(monkeypatch):
    checks = []
    monkeypatch.setattr("scalekd.distill.distiller.expect_unit_range", checks.append)
    student = timm.create_model("test_resnet", num_classes=3)
    distiller = Distiller(student, None, {"ce": {}}, image_size=(64, 64))
    for _ in range(3):
        distiller(torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 0]))
    assert len(checks) == 1


def test_a_few_values_outside_are_accepted():
    pixels = torch.rand(4, 3, 64, 64)
    pixels[0, 0, 0] = 1.2  # a bicubic resize overshoots at edges
    expect_unit_range(pixels)
    expect_unit_range(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
