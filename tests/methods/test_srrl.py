from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import timm
import torch
from torch import nn

from scalekd.distill.distiller import Distiller
from scalekd.methods.srrl import SRRL
from scalekd.models.stages import Features, Shapes, StageView

TINY = Shapes("tiny", ((2, 1, 2),) * 4, (2, 1, 2), 2, pooled=2)


def identity(**options) -> SRRL:
    """In eval mode: the BatchNorm gives what it is given."""
    method = SRRL(TINY, TINY, **options).eval()
    method.connector[1].eps = 1e-12  # no more than rounding; some releases of PyTorch refuse 0
    nn.init.eye_(method.connector[0].weight[:, :, 0, 0])
    return method


def by_hand() -> tuple[Features, Features]:
    """Student: pooled (1, 2), after a ReLU (2, 2). Teacher: (4, 1), and a classifier (a + b, 2 b) with bias (0, 1)."""
    final = torch.tensor([[[[4.0, -2.0]], [[2.0, 2.0]]]])
    classifier = nn.Linear(2, 2)
    classifier.weight.data = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    classifier.bias.data = torch.tensor([0.0, 1.0])
    pooled = torch.tensor([[4.0, 1.0]])
    nan = torch.full((1, 2, 1, 2), torch.nan)
    student = Features(torch.full((1, 2), torch.nan), (nan,) * 4, final)
    return student, Features(classifier(pooled), (nan,) * 4, nan, pooled=pooled, classify=classifier)


def test_without_relu_by_hand():
    losses = identity()(*by_hand(), torch.tensor([0]))
    assert losses["fm"].item() == pytest.approx((3**2 + 1**2) / 2)
    # W(1, 2) = (3, 5), W(4, 1) = (5, 3)
    assert losses["sr"].item() == pytest.approx((2**2 + 2**2) / 2)


def test_with_relu_and_weights_by_hand():
    losses = identity(relu=True, alpha=10.0, beta=3.0)(*by_hand(), torch.tensor([0]))
    assert losses["fm"].item() == pytest.approx(10 * (2**2 + 1**2) / 2)
    # W(2, 2) = (4, 5), W(4, 1) = (5, 3)
    assert losses["sr"].item() == pytest.approx(3 * (1**2 + 2**2) / 2)


@pytest.mark.parametrize("relu", [False, True])
def test_against_numpy_for_other_channels_and_grids(pair, relu):
    method = SRRL(pair.student, pair.teacher, relu=relu).double()
    student, teacher, targets = pair.features()
    x = np.einsum("dc,bchw->bdhw", method.connector[0].weight.detach()[:, :, 0, 0], student.final.detach())
    x = (x - x.mean(axis=(0, 2, 3), keepdims=True)) / np.sqrt(x.var(axis=(0, 2, 3), keepdims=True) + 1e-5)
    x = np.maximum(x, 0 if relu else -np.inf).mean(axis=(2, 3))
    logits = x @ pair.classifier.weight.numpy().T + pair.classifier.bias.numpy()
    losses = method(student, teacher, targets)
    assert losses["fm"].item() == pytest.approx(((x - teacher.pooled.detach().numpy()) ** 2).mean(), rel=1e-10)
    assert losses["sr"].item() == pytest.approx(((logits - teacher.logits.detach().numpy()) ** 2).mean(), rel=1e-10)


def test_gradients(pair):
    method = SRRL(pair.student, pair.teacher).double()
    student, teacher, targets = pair.features()
    assert torch.autograd.gradcheck(
        lambda x, *_: tuple(method(Features(student.logits, (), x), teacher, targets).values()),
        (student.final, *method.parameters()),
        eps=1e-5,
        atol=1e-4,
    )
    sum(method(student, teacher, targets).values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())
    assert teacher.pooled.grad is None and teacher.logits.grad is None
    assert all(p.grad is None for p in pair.classifier.parameters())


def test_each_term_reaches_the_student(pair):
    student, teacher, targets = pair.features()
    method = SRRL(pair.student, pair.teacher).double()
    for term in method(student, teacher, targets).values():
        (gradient,) = torch.autograd.grad(term, student.final, retain_graph=True)
        assert gradient.abs().max() > 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pair, dtype):
    method = SRRL(pair.student, pair.teacher)
    student, teacher, targets = pair.features(dtype=dtype)
    teacher.classify = pair.classifier.float()
    student.final.data *= 1e4
    with torch.autocast("cpu", torch.bfloat16):
        losses = method(student, teacher, targets)
    for value in losses.values():
        assert value.dtype == torch.float32 and value.isfinite()
    sum(losses.values()).backward()
    assert student.final.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alpha": -1.0}, "alpha is -1.0"), ({"alpha": 0.0, "beta": 0.0}, "one must be positive")],
)
def test_rejected_options(pair, options, message):
    with pytest.raises(ValueError, match=message):
        SRRL(pair.student, pair.teacher, **options)


def test_unsupported_models(pair):
    with pytest.raises(ValueError, match="needs a teacher"):
        SRRL(pair.student, None)
    for change in ({"pooled": 0}, {"classes": 0}):
        with pytest.raises(ValueError, match="headless has none"):
            SRRL(pair.student, dataclasses.replace(pair.teacher, model="headless", **change))
    blind = dataclasses.replace(pair.student, model="blind", maps=(), final=None)
    with pytest.raises(ValueError, match="blind gives logits only"):
        SRRL(blind, pair.teacher)


# ---------------------------------------------------------------- the teacher's classifier, of timm's models


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("test_resnet", 96),
        ("test_vit", 64),  # from the class token
        ("test_efficientnet", 256),
        ("mobilenetv3_small_050", 1024),  # wider than the final map, by a layer after the pooling
        ("convnext_atto", 320),  # a norm after the pooling
    ],
)
def test_classifier_and_what_it_was_given(name, channels):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    view = StageView(model, name=name, image_size=(160, 160))
    assert view.shapes.pooled == channels
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        features = view(images, classifier=True)
        assert features.pooled.shape == (2, channels)
        assert torch.equal(features.classify(features.pooled), features.logits)
        torch.testing.assert_close(features.logits, model(images))
        assert view(images).pooled is None
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("name", "size"),
    [("deit_tiny_distilled_patch16_224", 32), ("volo_d1_224", 64)],
)
def test_models_without_one_classifier_have_none(name, size):
    """Two heads; a head on every token too."""
    view = StageView(timm.create_model(name, num_classes=7, img_size=size), name=name, image_size=(size, size))
    assert view.shapes.pooled == 0
    with pytest.raises(ValueError, match=f"{name} has none"):
        SRRL(TINY, view.shapes)


def test_a_teacher_without_classifier_is_rejected():
    view = StageView(timm.create_model("test_vit", num_classes=0), name="headless", image_size=(160, 160))
    with pytest.raises(ValueError, match="headless has none"):
        SRRL(TINY, view.shapes)


def test_in_a_distiller():
    """A CNN learns from a ViT with other classes; the classifier stays as it was."""
    torch.manual_seed(0)
    student = timm.create_model("test_resnet", num_classes=3)
    teacher = timm.create_model("test_vit", num_classes=7)
    distiller = Distiller(student, teacher, {"srrl": {"weight": 2.0}}, image_size=(160, 160)).train()
    losses = distiller(torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8), torch.tensor([0, 1]))
    losses["total"].backward()
    assert losses.keys() == {"srrl.fm", "srrl.sr", "total"}
    assert student.conv1[0].weight.grad.abs().max() > 0
    assert all(p.grad is None for p in teacher.parameters())
    other = Distiller(student, teacher, {"rkd": {}}, image_size=(160, 160))
    assert not other.teachers["teacher"].needs_classifier
