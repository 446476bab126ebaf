"""Weights: every tensor accounted for, a classifier for other classes told, all else refused."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from structures import with_structure
from torch import nn

from scalekd.common.errors import UserError
from scalekd.config.recipe import check_config
from scalekd.distill.build import build
from scalekd.models.build import build_model
from scalekd.models.options import Model
from scalekd.models.weights.match import State, grouped
from scalekd.models.weights.trained import backbone_sha256, initial_share, noise_share
from scalekd.train.run import provenance

SMALL = {"embed_dim": 24, "depth": 4, "num_heads": 3, "img_size": 48}
HEADS = {  # model: what makes it small, tensors of its classifier or classifiers
    "test_resnet": ({}, 2),
    "test_vit": ({"depth": 4, "img_size": 48}, 2),
    "deit_tiny_distilled_patch16_224": (SMALL, 4),
    "test_convnext": ({}, 2),
}


def trained_file(path: Path, name: str, classes: int, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Writes weights in which no tensor is at its initial value, nor without structure; returns them."""
    state = timm.create_model(name, num_classes=classes, **kwargs).state_dict()
    state = {k: with_structure(v) if v.is_floating_point() and v.ndim else v for k, v in state.items()}
    save_file(state, path)
    return state


def made(
    where: str,
    weights: object,
    name: str,
    kwargs: dict[str, Any],
    classes: int | None = 3,
    prefix: str | None = None,
) -> Any:
    spec = Model(model=name, weights=str(weights), kwargs=kwargs, prefix=prefix)
    return build_model(spec, channels=3, image_size=(48, 48), classes=classes, where=where)


def filled(model: nn.Module, state: dict[str, torch.Tensor]) -> int:
    """How many tensors of the model are those of the file."""
    return sum(v.shape == state[k].shape and torch.equal(v, state[k]) for k, v in model.state_dict().items())


def refused(weights: Path, **more: Any) -> str:
    with pytest.raises(UserError) as error:
        made("teacher", weights, "test_resnet", {}, **more)
    return str(error.value)


@pytest.mark.parametrize("name", HEADS)
def test_a_student_gets_a_new_head_and_all_the_rest(tmp_path, name):
    kwargs, of_heads = HEADS[name]
    state = trained_file(tmp_path / "w.safetensors", name, 7, **kwargs)
    model, loaded = made("student", tmp_path / "w.safetensors", name, kwargs)
    assert model.num_classes == 3 and model.eval()(torch.zeros(1, 3, 48, 48)).shape == (1, 3)
    assert (loaded.matched, loaded.total) == (len(state) - of_heads, len(state))
    assert filled(model, state) == loaded.matched
    assert loaded.head == "new head for 3 classes (instead of 7)"


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
    assert loaded.head == "new head for 3 classes (instead of 1000)"
    model, loaded = made("teacher", "pretrained", "test_resnet", {}, classes=None)
    assert filled(model, pretrained) == loaded.matched == loaded.total and loaded.head is None


def test_a_pretrained_teacher_gets_no_head_that_was_never_trained(pretrained):
    with pytest.raises(UserError, match=r"teacher\.kwargs: num_classes would replace the trained head"):
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
    assert "new head for 3 classes (instead of 9)" in told
    assert "data 3, student 3; the teacher has 7 other classes: only its features are used" in told
    refused = cli("train", recipe_file, "--dry-run", *weights)
    assert refused.code == 2 and "kd: test_resnet has 3 classes and test_vit 7. Use a teacher with" in refused.err

    tiny_recipe["student"]["weights"] = str(files["student"])
    run = build(check_config(tiny_recipe, "test"), torch.device("cpu"))
    assert provenance(run)["weights"]["student"]["head"] == "new head for 3 classes (instead of 9)"


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


# ---------------------------------------------------------------- what stands before the names


def other(state: State) -> State:
    return {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}


def named(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


LAYOUTS = {  # what a file holds -> what is taken off, and how many of its tensors are left
    "a plain file": (lambda s: s, "", 0),
    "DataParallel's": (lambda s: named("module.", s), "module.", 0),
    "torch.compile's": (lambda s: named("_orig_mod.module.", s), "_orig_mod.module.", 0),
    "timm's checkpoint": (
        lambda s: {"epoch": 3, "state_dict": s, "optimizer": {"state": {0: {"m": s["fc.bias"]}}}},
        "state_dict.",
        0,
    ),
    "timm's, averaged": (lambda s: {"state_dict": other(s), "state_dict_ema": s}, "state_dict_ema.", 1),
    "Lightning's": (
        lambda s: {"state_dict": named("model.", s) | {"loss.weight": torch.ones(2)}},
        "state_dict.model.",
        "one",
    ),
    "a wrapper's": (lambda s: named("backbone.", s) | {"neck.weight": torch.ones(2)}, "backbone.", "one"),
    "DINO's": (
        lambda s: {
            "teacher": named("backbone.", s) | {"head.mlp.0.weight": torch.ones(2)},
            "student": {"x": torch.ones(1)},
        },
        "teacher.backbone.",
        "two",
    ),
    "mmengine's": (  # the averaged ones are in state_dict
        lambda s: {
            "state_dict": s,
            "ema_state_dict": named("module.", other(s)) | {"steps": torch.tensor(7)},
            "meta": {"epoch": 3},
        },
        "state_dict.",
        "one more",
    ),
    "averaged ones of others": (lambda s: {"state_dict": other(s), "ema_state_dict": s}, "ema_state_dict.", 1),
    "torchvision's": (
        lambda s: {"model": other(s), "model_ema": named("module.", s) | {"n_averaged": torch.tensor(7)}},
        "model_ema.module.",
        "one more",
    ),
    "Lightning's averaged": (
        lambda s: {
            "state_dict": named("model.", s),
            "current_model_state": named("model.", other(s)),
            "averaging_state": {"n_averaged": torch.tensor(7)},
        },
        "state_dict.model.",
        "one more",
    ),
    "torch's averaged": (lambda s: named("module.", s) | {"n_averaged": torch.tensor(7)}, "module.", "one"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prefix_is_taken_off_where_all_of_the_model_is_under_it(tmp_path, layout):
    laid_out, prefix, left = LAYOUTS[layout]
    state = trained_file(tmp_path / "w.safetensors", "test_resnet", 3)
    torch.save(laid_out(state), tmp_path / "w.pt")
    model, loaded = made("teacher", tmp_path / "w.pt", "test_resnet", {})
    assert loaded.prefix == prefix and filled(model, state) == loaded.matched == loaded.total == len(state)
    unexpected = sum(count_of(group) for group in loaded.keys["unexpected"])
    assert unexpected == {"one": 1, "two": 2, "one more": len(state) + 1}.get(left, left * len(state))
    assert sum(count_of(group) for group in loaded.keys["matched"]) == len(state) and not loaded.keys["missing"]


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("model", ["test_resnet", "test_efficientnet"])
def test_batch_norms_without_counters_are_loaded(tmp_path, model, prefix):
    """As torch loads them strictly. The counters are shown as missing, and nothing else may be."""
    state = trained_file(tmp_path / "w.safetensors", model, 3)
    old = {name: value for name, value in state.items() if "num_batches_tracked" not in name}
    save_file(named(prefix, old), tmp_path / "w.safetensors")
    loaded_model, loaded = made("teacher", tmp_path / "w.safetensors", model, {})
    assert len(old) == loaded.matched < loaded.total == len(state)
    assert loaded.prefix == prefix and not loaded.keys["unexpected"]
    assert all("num_batches_tracked" in name for name in loaded.keys["missing"])
    plain = timm.create_model(model, num_classes=3)
    plain.load_state_dict(old)  # strict
    for name, value in plain.state_dict().items():
        assert torch.equal(value, loaded_model.state_dict()[name]), name
    dropped = next(name for name in old if name.endswith("running_var"))
    save_file({name: value for name, value in old.items() if name != dropped}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"1 missing \(.*running_var"):
        made("teacher", tmp_path / "w.safetensors", model, {})


def count_of(group: str) -> int:
    return int(group.split("(")[1][:-1]) if "(" in group else 1


def test_a_prefix_of_a_model_for_other_classes(tmp_path):
    state = trained_file(tmp_path / "w.safetensors", "test_resnet", 7)
    save_file(named("backbone.", state), tmp_path / "w.safetensors")
    model, loaded = made("teacher", tmp_path / "w.safetensors", "test_resnet", {})
    assert model.num_classes == 7 and filled(model, state) == len(state) and loaded.prefix == "backbone."
    model, loaded = made("student", tmp_path / "w.safetensors", "test_resnet", {})
    assert loaded.head == "new head for 3 classes (instead of 7)"
    assert loaded.keys["missing"] == ["fc.bias", "fc.weight"]
    assert loaded.keys["unexpected"] == ["backbone.fc.bias", "backbone.fc.weight"]


def test_of_two_models_in_a_file_none_is_chosen(tmp_path):
    state = trained_file(tmp_path / "w.safetensors", "test_resnet", 3)
    path = tmp_path / "w.pt"
    torch.save({"teacher": named("backbone.", state), "student": named("module.backbone.", other(state))}, path)
    told = refused(path)
    assert "contains several models that fit; choose one with " in told
    assert "teacher.prefix=teacher.backbone. or teacher.prefix=student.module.backbone." in told
    model, loaded = made("teacher", path, "test_resnet", {}, prefix="teacher.backbone.")
    assert filled(model, state) == len(state) and loaded.prefix == "teacher.backbone."
    model, _ = made("teacher", path, "test_resnet", {}, prefix="student.module.backbone.")
    assert filled(model, other(state)) == len(state)
    model, loaded = made("teacher", path, "test_resnet", {}, prefix="teacher.backbone")
    assert filled(model, state) == len(state) and loaded.prefix == "teacher.backbone.", "the dot may be left out"
    assert all(key.startswith("student.") for key in loaded.keys["unexpected"])
    told = refused(path, prefix="student.backbone.")
    assert "teacher.prefix: no tensor in" in told and "begins with student.backbone." in told
    with pytest.raises(UserError, match=r"teacher\.prefix has no effect without"):
        made("teacher", "random", "test_resnet", {}, prefix="x.")


@pytest.mark.parametrize("change", ["one less", "one more"])
def test_a_prefix_under_which_not_all_fits_is_not_taken_off(tmp_path, change):
    state = trained_file(tmp_path / "w.safetensors", "test_resnet", 3)
    if change == "one less":
        del state["layer1.0.bn1.bias"]
    else:
        state["layer9.weight"] = torch.ones(2)
    save_file(named("model.", state), tmp_path / "w.safetensors")
    told = refused(tmp_path / "w.safetensors")
    count = len(timm.create_model("test_resnet").state_dict())
    if change == "one less":
        assert f"{count - 1} of {count} tensors matched; 1 missing (layer1.0.bn1.bias)" in told
    else:
        assert f"{count} of {count} tensors matched; 1 left over (layer9.weight)" in told


def test_names_are_told_in_groups():
    keys = ["blocks.0.norm.weight", "blocks.1.norm.weight", "blocks.10.norm.weight", "0.bias", "conv1.weight", "norm.0"]
    assert grouped(keys) == ["0.bias", "blocks.*.norm.weight (3)", "conv1.weight", "norm.0"]


def test_an_object_that_could_run_code_is_named(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "half": Fraction(1, 2)}, tmp_path / "w.pt")
    told = refused(tmp_path / "w.pt")
    assert "contains fractions.Fraction besides tensors and is not opened" in told and "can run code" in told


# ---------------------------------------------------------------- whether anyone trained them


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "mixer_s32_224"])
def test_initial_values_have_no_structure(name):
    torch.manual_seed(3)
    assert noise_share(timm.create_model(name)) == 1.0


@pytest.mark.parametrize("file", ["src/scalekd/demo/teacher.safetensors", "lab/teacher/student.safetensors"])
def test_trained_weights_have_structure(file):
    path = Path(__file__).parents[2] / file
    card = json.loads(path.with_suffix(".json").read_text())
    model = timm.create_model(card["model"], checkpoint_path=str(path), **card["kwargs"])
    assert noise_share(model) == 0.0
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.flatten()[torch.randperm(p.numel())].view(p.shape))
    assert noise_share(model) == 1.0


def test_a_step_is_not_enough_for_structure_and_a_product_of_vectors_is():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    assert initial_share(model) < 0.1 and noise_share(model) > 0.9
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(with_structure(p))
    assert noise_share(model) == 0.0
    assert noise_share(nn.Conv2d(3, 64, 3)) is None, "its matrices are too small to tell"


def test_a_backbone_of_which_half_was_loaded(tmp_path):
    """The first blocks from a trained model, the others fresh: no share of constant biases tells that for sure."""
    file = Path(__file__).parents[2] / "src/scalekd/demo/teacher.safetensors"
    card = json.loads(file.with_suffix(".json").read_text())
    model = timm.create_model(card["model"], **card["kwargs"])
    state = {k: v for k, v in load_file(file).items() if not k.startswith(("blocks.4", "blocks.5", "blocks.3"))}
    model.load_state_dict(state, strict=False)
    assert initial_share(model) < 0.5 and 0.3 < noise_share(model) < 0.7


def test_timm_s_own_weights_have_a_checksum(pretrained):
    model, loaded = made("teacher", "pretrained", "test_resnet", {}, classes=None)
    assert loaded.sha256 == backbone_sha256(model, replace(loaded, sha256=None)) and len(loaded.sha256) == 64
    assert sum(count_of(group) for group in loaded.keys["matched"]) == loaded.total
