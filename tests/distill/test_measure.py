"""Methods that measure their teacher before training (`fm`): what is measured, when, and that it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn
from whole_runs import CPU, Interrupted, assert_same, changed, final_state, start

from scalekd.checks.step import dead_parameters
from scalekd.common.errors import UserError
from scalekd.common.seeds import seed_everything
from scalekd.config.recipe import check_config
from scalekd.distill.balance import Gradients, backbone_parameters
from scalekd.distill.build import build
from scalekd.distill.distiller import Distiller

SIZE = (48, 48)
IMAGES = torch.rand(12, 3, *SIZE, generator=torch.Generator().manual_seed(0))
NONE = torch.empty(0, dtype=torch.long)


def model(name: str, seed: int, **kwargs: Any) -> nn.Module:
    made = timm.create_model(name, num_classes=0, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    for p in made.parameters():
        nn.init.normal_(p, std=0.2, generator=generator)
    return made.eval()


def vit(seed: int, scale: float = 1.0) -> nn.Module:
    made = model("test_vit", seed, img_size=48)
    with torch.no_grad():
        made.norm.weight *= scale
        made.norm.bias *= scale
    return made


def distiller(fm: dict[str, Any], teachers: Any = None, student: str = "test_resnet", **more: Any) -> Distiller:
    torch.manual_seed(0)  # of the projectors
    sized = {"img_size": 48} if "vit" in student else {}
    return Distiller(model(student, 5, **sized), teachers or vit(1), {"fm": fm, **more}, image_size=SIZE)


def test_it_learns_from_the_class_token_after_the_final_norm() -> None:
    both = distiller({}, student="test_vit").eval()
    features = both.teacher_features(IMAGES)
    teacher = both.teachers["teacher"]
    tokens = teacher.view.model.forward_features((IMAGES - teacher.mean) / teacher.std)
    torch.testing.assert_close(features.pooled, tokens[:, 0])
    torch.testing.assert_close(features.final.flatten(2).mT, tokens[:, 1:])
    own = both.student.forward_features((IMAGES - both.student_mean) / both.student_std)
    torch.testing.assert_close(both.student_features(IMAGES).pooled, own[:, 0])


def test_without_measuring_the_first_batch_is_measured() -> None:
    first, explicit = distiller({}), distiller({})
    explicit.measure([IMAGES])
    wanted = explicit(IMAGES, NONE)
    assert_same({k: v.detach() for k, v in first(IMAGES, NONE).items()}, {k: v.detach() for k, v in wanted.items()})
    assert first.images_to_measure == explicit.images_to_measure == 0
    before = {name: b.clone() for name, b in first.methods.named_buffers()}
    first.measure([IMAGES.flip(0)])  # does nothing any more
    first(IMAGES.flip(0), NONE)
    assert_same(before, dict(first.methods.named_buffers()))
    skipped = distiller({})
    skipped.skip_measuring()
    assert not torch.allclose(skipped(IMAGES, NONE)["total"], wanted["total"])


def test_images_of_bytes_are_those_in_the_unit_range() -> None:
    pixels = (IMAGES * 255).to(torch.uint8)
    a, b = distiller({"standardise": "channel"}), distiller({"standardise": "channel"})
    a.measure([pixels[:5], pixels[5:]])
    b.measure([pixels.float() / 255])
    for (name, x), y in zip(a.methods.named_buffers(), b.methods.buffers()):
        torch.testing.assert_close(x, y, msg=name)


def shares(fm: dict[str, Any]) -> list[float]:
    """The shares of a teacher and of another whose features are 100 times as large in the gradient at the student."""
    d = distiller(fm, {"small": vit(1), "large": vit(2, scale=100.0)}).train()
    terms = d(IMAGES, NONE)
    meter, one = Gradients(d.methods, 1, 0.0), torch.ones(())
    meter.measure(terms, backbone_parameters(d.student), one)
    meter.update(one)
    return meter.shares().tolist()


def test_a_teacher_with_large_features_does_not_drown_another() -> None:
    assert shares({"standardise": "none", "loss": "mse"})[0] < 0.02  # the gradient of smooth L1 is at most 1
    for standardise in ("phi-s", "channel"):
        for loss in ("mse", "cosine_l1"):
            assert 0.3 < shares({"standardise": standardise, "loss": loss})[0] < 0.7


def test_there_must_be_images() -> None:
    with pytest.raises(UserError, match="no images to measure"):
        distiller({}).measure([])


# ---------------------------------------------------------------- teachers left out


def test_teachers_are_left_out() -> None:
    teachers = {"a": vit(1), "b": vit(2), "c": vit(3)}
    whole, drop = distiller({}, teachers), distiller({"teacher_drop": 0.9}, teachers)
    for each in (whole, drop):
        each.measure([IMAGES])
    torch.manual_seed(0)
    got = {key: value.item() for key, value in drop(IMAGES, NONE).items()}
    torch.manual_seed(0)
    assert got == {key: value.item() for key, value in drop(IMAGES, NONE).items()}  # from the generator of the step
    torch.manual_seed(1)
    assert got != {key: value.item() for key, value in drop(IMAGES, NONE).items()}
    plain = {key: value.item() for key, value in whole(IMAGES, NONE).items()}
    assert got.keys() == plain.keys() and got["total"] > plain["total"]  # the hardest are left


def test_one_teacher_cannot_be_left_out() -> None:
    with pytest.raises(UserError, match=r"losses.fm.teacher_drop: needs several teachers and the loss uses one"):
        distiller({"teacher_drop": 0.5})


# ---------------------------------------------------------------- runs


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any]) -> dict[str, Any]:
    """Two teachers, mixed images, steps of two micro-batches; 12 of the run's 48 images would do, 16 are measured."""
    several = changed(tiny_recipe, train={"accumulate": 2, "save_minutes": 0}, augment={"mixup": 0.5})
    several["losses"] = {"ce": {}, "fm": {"images": 12, "standardise": "channel", "teacher_drop": 0.5}}
    several["teachers"] = {
        "vit": {"model": "test_vit", "kwargs": {"depth": 4}, "weights": "random"},
        "cnn": {"model": "test_convnext", "weights": "random", "image_size": 64},
    }
    del several["teacher"]
    return several


def test_the_first_images_of_a_run_are_measured(recipe: dict[str, Any]) -> None:
    run = build(check_config(recipe, "test"), CPU)
    run.prepare()
    seen = []
    for micro, batch in enumerate(run.train_batches(run.train_sampler(steps=2), workers=0)):
        seed_everything(run.config.seed, *divmod(micro, 2))  # as before each micro-batch of training
        seen.append(run.distiller.teachers["cnn"](run.inputs(batch)[0]).final)
    x = torch.cat(seen).permute(0, 2, 3, 1).flatten(0, 2).double().numpy()
    assert len(torch.cat(seen)) == 16
    measured = run.distiller.methods["fm@cnn"].targets["patch"]
    np.testing.assert_allclose(measured.mean, x.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(measured.weight, 1 / x.std(0), rtol=1e-3)


def test_a_layer_before_the_classifier_is_trained_without_labels(tiny_recipe: dict[str, Any]) -> None:
    recipe = changed(tiny_recipe, losses={"fm": {}}, student={"model": "mobilenetv3_small_050"})
    run = build(check_config(recipe, "test"), CPU)
    assert run.distiller.student_view.shapes.classes == 0
    run.model.train()(IMAGES, NONE)["total"].backward()
    assert dead_parameters(run.model) == [] and run.student.conv_head.weight.grad.abs().max() > 0
    with pytest.raises(UserError, match=r"would stay untrained\. Add fm, which trains it"):
        build(check_config(changed(recipe, losses={"fd": {}}), "test"), CPU)


def test_a_run_goes_on_with_its_statistics(recipe: dict[str, Any], tmp_path: Path) -> None:
    start(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        start(recipe, tmp_path / "parts", stop_at=4, check=True)
    start(recipe, tmp_path / "parts")
    states = [final_state(tmp_path / name) for name in ("whole", "parts")]
    assert states[0]["methods"]["fm@vit.measured"]
    assert_same(*states)
