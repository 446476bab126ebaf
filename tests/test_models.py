"""Weights: every tensor accounted for, a classifier for other classes told, all else refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from scalekd.build import build
from scalekd.config import Model, check_config
from scalekd.errors import UserError
from scalekd.models import build_model
from scalekd.runs import provenance

SMALL = {"embed_dim": 24, "depth": 4, "num_heads": 3, "img_size": 48}
HEADS = {  # model: what makes it small, tensors of its classifier or classifiers
    "test_resnet": ({}, 2),
    "test_vit": ({"depth": 4, "img_size": 48}, 2),
    "deit_tiny_distilled_patch16_224": (SMALL, 4),
    "test_convnext": ({}, 2),
}


def trained_file(path: Path, name: str, classes: int, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Writes weights in which no tensor is at its initial value; returns them."""
    state = timm.create_model(name, num_classes=classes, **kwargs).state_dict()
    state = {k: torch.rand(v.shape) if v.is_floating_point() else v for k, v in state.items()}
    save_file(state, path)
    return state


def made(where: str, weights: object, name: str, kwargs: dict[str, Any], classes: int | None = 3) -> Any:
    spec = Model(model=name, weights=str(weights), kwargs=kwargs)
    return build_model(spec, channels=3, image_size=(48, 48), classes=classes, where=where)


def filled(model: nn.Module, state: dict[str, torch.Tensor]) -> int:
    """How many tensors of the model are those of the file."""
    return sum(v.shape == state[k].shape and torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", HEADS)
def test_a_student_gets_a_new_head_and_all_the_rest(tmp_path, name):
    kwargs, of_heads = HEADS[name]
    state = trained_file(tmp_path / "w.safetensors", name, 7, **kwargs)
    model, loaded = made("student", tmp_path / "w.safetensors", name, kwargs)
    assert model.num_classes == 3 and model.eval()(torch.zeros(1, 3, 48, 48)).shape == (1, 3)
    assert (loaded.matched, loaded.total) == (len(state) - of_heads, len(state))
    assert filled(model, state) == loaded.matched
    assert loaded.head == "new head for 3 classes, the old one was for 7"


@pytest.mark.parametrize("name", HEADS)
def test_a_teacher_keeps_the_head_of_its_file(tmp_path, name):
    kwargs, _ = HEADS[name]
    state = trained_file(tmp_path / "w.safetensors", name, 7, **kwargs)
    model, loaded = made("teacher", tmp_path / "w.safetensors", name, kwargs)
    assert model.num_classes == loaded.kwargs["num_classes"] == 7
    assert filled(model, state) == loaded.matched == loaded.total == len(state) and loaded.head is None


@pytest.mark.parametrize("where", ["student", "teacher"])
def test_a_head_for_the_same_classes_is_loaded(tmp_path, where):
    state = trained_file(tmp_path / "w.safetensors", "test_resnet", 3)
    model, loaded = made(where, tmp_path / "w.safetensors", "test_resnet", {})
    assert filled(model, state) == loaded.matched == loaded.total and loaded.head is None


@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("change", ["a norm", "the head's width", "a missing bias", "a second count"])
def test_any_other_difference_is_refused(tmp_path, where, change):
    state = trained_file(tmp_path / "w.safetensors", "test_resnet", 7)
    state |= {
        "a norm": {"layer1.0.bn1.weight": torch.rand(5)},
        "the head's width": {"fc.weight": torch.rand(7, 5)},
        "a second count": {"fc.bias": torch.rand(6)},
    }.get(change, {})
    if change == "a missing bias":
        del state["fc.bias"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=rf"{where}\.weights: .* does not fit {where}\.model and its kwargs"):
        made(where, tmp_path / "w.safetensors", "test_resnet", {})


def test_a_teacher_s_class_count_that_was_asked_for_is_kept(tmp_path):
    trained_file(tmp_path / "w.safetensors", "test_resnet", 7)
    with pytest.raises(UserError, match=r"fc\.bias is \(7,\) in the file, \(5,\) in the model"):
        made("teacher", tmp_path / "w.safetensors", "test_resnet", {"num_classes": 5})


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    """timm's pre-trained weights of test_resnet, 1,000 classes, come from a file."""
    create = timm.create_model
    state = trained_file(tmp_path / "timm.safetensors", "test_resnet", 1000)

    def from_file(name, pretrained=False, **kwargs):
        return create(name, pretrained, pretrained_cfg_overlay={"file": str(tmp_path / "timm.safetensors")}, **kwargs)

    monkeypatch.setattr(timm, "create_model", from_file)
    return state


def test_pretrained_weights_and_a_new_head(pretrained):
    model, loaded = made("student", "pretrained", "test_resnet", {})
    assert filled(model, pretrained) == loaded.matched == len(pretrained) - 2 == loaded.total - 2
    assert loaded.head == "new head for 3 classes, the old one was for 1000"
    model, loaded = made("teacher", "pretrained", "test_resnet", {}, classes=None)
    assert filled(model, pretrained) == loaded.matched == loaded.total and loaded.head is None


def test_a_pretrained_teacher_gets_no_head_that_was_never_trained(pretrained):
    with pytest.raises(UserError, match=r"teacher\.kwargs: num_classes would give a head that was never trained"):
        made("teacher", "pretrained", "test_resnet", {"num_classes": 3}, classes=None)
    model, loaded = made("teacher", "pretrained", "test_resnet", {"num_classes": 0}, classes=None)
    assert filled(model, pretrained) == loaded.matched == loaded.total and loaded.head is None


def test_the_pre_flight_and_the_provenance_tell_it(cli, recipe_file, tiny_recipe, tmp_path):
    files = {role: tmp_path / f"{role}.safetensors" for role in ("student", "teacher")}
    state = trained_file(files["student"], "test_resnet", 9)
    trained_file(files["teacher"], "test_vit", 7, depth=4, img_size=48)
    weights = [f"{role}.weights={file}" for role, file in files.items()]
    shown = cli("train", recipe_file, "--dry-run", *weights, "losses.kd=off")
    told = " ".join(shown.out.split())
    assert shown.code == 0, shown.err
    assert f"{len(state) - 2} of {len(state)} tensors from" in told
    assert "new head for 3 classes, the old one was for 9" in told
    assert "data 3, student 3; the teacher's 7 classes are others, only its features are used" in told
    refused = cli("train", recipe_file, "--dry-run", *weights)
    assert refused.code == 2 and "kd: test_resnet has 3 classes and test_vit 7. Use a teacher of" in refused.err

    tiny_recipe["student"]["weights"] = str(files["student"])
    run = build(check_config(tiny_recipe, "test"), torch.device("cpu"))
    assert provenance(run)["weights"]["student"]["head"] == "new head for 3 classes, the old one was for 9"


SWIN = {"embed_dim": 24, "num_heads": [1, 2, 3, 6], "depths": [1, 1, 1, 1]}
BEIT = {"embed_dim": 24, "num_heads": 3, "depth": 4}


@pytest.mark.parametrize(
    "name, theirs, ours",
    [
        ("swin_tiny_patch4_window7_224", SWIN | {"img_size": 112}, SWIN | {"window_size": 4}),
        ("beit_base_patch16_224", BEIT | {"img_size": 64}, BEIT),
    ],
)
def test_tables_of_another_window_are_resized_without_a_word(tmp_path, name, theirs, ours):
    trained_file(tmp_path / "w.safetensors", name, 3, **theirs)
    spec = Model(model=name, weights=str(tmp_path / "w.safetensors"), kwargs=ours)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, loaded = build_model(spec, channels=3, image_size=(128, 128), classes=3, where="student")
    assert loaded.matched == loaded.total and [str(w.message) for w in told] == []
