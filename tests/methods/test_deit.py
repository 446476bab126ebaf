from __future__ import annotations

import dataclasses
from math import log
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from by_hand import randomised
from scipy.special import log_softmax, rel_entr, softmax

from scalekd.common.errors import UserError
from scalekd.distill.distiller import Distiller
from scalekd.distill.quantised import fake_quantise
from scalekd.methods.deit import DeiT
from scalekd.models.stages import Features, Shapes, StageView
from scalekd.models.two_heads import has_two_heads

S3 = Shapes("s", (), None, 3, two_heads=True)
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}


def test_hard_on_paper():
    """Probabilities 1/8, 2/8, 5/8 of the second head; the teacher says class 1 and class 2. The first head and the
    labels do not matter."""
    second = torch.tensor([[log(1), log(2), log(5)]] * 2)
    student = Features(torch.randn(2, 3), distilled=second)
    teacher = Features(torch.tensor([[0.0, 9.0, 8.0], [-3.0, -2.0, -1.0]]))
    loss = DeiT(S3, S3)(student, teacher, torch.tensor([0, 0]))["deit"]
    assert loss.item() == pytest.approx((-log(2 / 8) - log(5 / 8)) / 2, rel=1e-6)


@pytest.mark.parametrize(("kind", "temperature"), [("hard", 1.0), ("soft", 1.0), ("soft", 3.0)])
def test_against_numpy(pair, kind, temperature):
    student, teacher, targets = pair.features(batch=7)
    d, t = student.distilled.detach().numpy(), teacher.logits.detach().numpy()
    if kind == "hard":
        expected = -np.mean([row[i] for row, i in zip(log_softmax(d, axis=1), t.argmax(axis=1), strict=True)])
    else:
        p, q = softmax(t / temperature, axis=1), softmax(d / temperature, axis=1)
        expected = temperature**2 * rel_entr(p, q).sum() / 7
    loss = DeiT(pair.student, pair.teacher, kind=kind, temperature=temperature)(student, teacher, targets)["deit"]
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_gradient_of_the_second_head_only(pair, kind):
    student, teacher, targets = pair.features()
    method = DeiT(pair.student, pair.teacher, kind=kind)
    assert torch.autograd.gradcheck(
        lambda d: method(Features(student.logits, distilled=d), teacher, targets)["deit"], student.distilled
    )
    method(student, teacher, targets)["deit"].backward()
    assert student.logits.grad is None and teacher.logits.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_half_precision(pair, kind, dtype):
    student, teacher, targets = pair.features(dtype=torch.float32)
    student.distilled, teacher.logits = student.distilled.to(dtype), teacher.logits.to(dtype)
    method = DeiT(pair.student, pair.teacher, kind=kind)
    with torch.autocast("cpu", dtype):
        low = method(student, teacher, targets)["deit"]
    student.distilled, teacher.logits = student.distilled.float(), teacher.logits.float()
    assert low.dtype == torch.float32 and torch.equal(low, method(student, teacher, targets)["deit"])


def distiller(losses: dict) -> Distiller:
    torch.manual_seed(0)
    student = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, **SMALL)
    student = randomised(student).float()  # fresh heads are zero
    teacher = timm.create_model("test_vit", num_classes=5, img_size=32)
    return Distiller(student, teacher, losses, image_size=(32, 32)).train()


@pytest.mark.parametrize("more", [{}, {"fd": {}}], ids=["logits", "maps"])
def test_labels_train_the_first_head_and_the_teacher_the_second(more):
    """With and without maps, which come from other passes of timm's."""
    d = distiller({"ce": {}, "deit": {}, **more})
    pixels, targets = torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 2])
    first, second = d.student((pixels - d.student_mean) / d.student_std)
    losses = d(pixels, targets)
    said = d.teacher_features(pixels).logits.argmax(dim=1)
    assert losses["ce"].item() == pytest.approx(torch.nn.functional.cross_entropy(first, targets).item(), rel=1e-5)
    assert losses["deit"].item() == pytest.approx(torch.nn.functional.cross_entropy(second, said).item(), rel=1e-5)
    losses["ce"].backward(retain_graph=True)
    assert d.student.head_dist.weight.grad is None and d.student.head.weight.grad.abs().max() > 0
    d.student.head.weight.grad = None
    losses["deit"].backward()
    assert d.student.head.weight.grad is None and d.student.head_dist.weight.grad.abs().max() > 0


def test_without_the_method_both_heads_are_averaged():
    d = distiller({"ce": {}})
    pixels, targets = torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 2])
    mean = d.student((pixels - d.student_mean) / d.student_std)
    assert isinstance(mean, torch.Tensor)
    expected = torch.nn.functional.cross_entropy(mean, targets).item()
    assert d(pixels, targets)["ce"].item() == pytest.approx(expected, rel=1e-5)


def test_in_evaluation_the_heads_are_averaged():
    d = distiller({"ce": {}, "deit": {}})
    pixels = torch.rand(2, 3, 32, 32)
    first, second = d.student(pixels)
    torch.testing.assert_close(d.student.eval()(pixels), (first + second) / 2)
    with pytest.raises(ValueError, match="in eval mode"):
        d(pixels, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("deit_tiny_distilled_patch16_224", {}, True),
        ("deit_tiny_distilled_patch16_224", {"num_classes": 0}, False),
        ("deit_tiny_patch16_224", {}, False),
        ("levit_128s", {}, True),
        ("pit_ti_distilled_224", {}, True),
        ("pit_ti_224", {}, False),
        ("repvit_m0_9", {}, True),
        ("repvit_m0_9", {"distillation": False}, False),
        ("efficientformerv2_s0", {}, True),
        ("swiftformer_xs", {}, True),
        ("resnet18", {}, False),
    ],
)
def test_which_models_have_two_heads(name, options, expected):
    with torch.device("meta"):
        assert has_two_heads(timm.create_model(name, **options)) is expected


def test_other_families_give_both_heads():
    torch.manual_seed(0)
    model = timm.create_model("repvit_m0_9", num_classes=4)
    view = StageView(model, name="repvit_m0_9", image_size=(32, 32))
    assert view.shapes.two_heads
    model.train().set_distilled_training(True)
    features = view(torch.rand(2, 3, 32, 32))
    assert features.logits.shape == features.distilled.shape == (2, 4)
    assert features.first(1).distilled.shape == (1, 4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda s: DeiT(s, None), "deit needs a teacher"),
        (lambda s: DeiT(dataclasses.replace(s, two_heads=False), s), "deit_tiny_distilled_patch16_224, or kd"),
        (lambda s: DeiT(s, dataclasses.replace(s, classes=7)), "7"),
        (lambda s: DeiT(s, s, kind="both"), "choose from 'hard', 'soft'"),
        (lambda s: DeiT(s, s, kind="soft", temperature=0.0), "temperature"),
        (lambda s: DeiT(s, s, temperature=3.0), "no effect on hard"),
    ],
)
def test_rejected_options(build, message):
    with pytest.raises(ValueError, match=message):
        build(S3)


def test_a_student_with_one_head_is_told_before_training():
    student, teacher = (timm.create_model("test_vit", num_classes=5, img_size=32) for _ in range(2))
    with pytest.raises(UserError, match=r"losses\.deit: deit needs a student with a second head"):
        Distiller(student, teacher, {"ce": {}, "deit": {}}, image_size=(32, 32))


def test_a_quantised_student_is_rejected(pair):
    """It gives the mean of its heads only, whatever else the distiller holds."""
    distiller: Any = SimpleNamespace(methods={"ce": object(), "deit": DeiT(pair.student, pair.teacher)})
    nothing: Any = None
    with pytest.raises(UserError, match=r"losses\.deit=off losses\.kd"):
        fake_quantise(distiller, nothing, nothing, nothing)
