"""Weights files: what is read beside the tensors, and what is told of a file, a folder or a model that is not the right one."""

from __future__ import annotations

import json
import pathlib
import shlex
from argparse import Namespace
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from torch import Tensor, nn

from scalekd.common.errors import UserError
from scalekd.config.recipe import check_config, load_recipe
from scalekd.distill.distiller import Distiller
from scalekd.models.build import build_model
from scalekd.models.options import Model
from scalekd.models.weights.file import as_overrides, read_file, train_arguments
from scalekd.models.weights.match import as_prefix, find_prefix, load_weights, read_weights

VIT = {"depth": 4, "img_size": 48}


def trained(**kwargs: Any) -> nn.Module:
    """A small ViT in which no tensor is at its initial value, with products of matrices in place of noise."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", **VIT | {"num_classes": 3} | kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand(len(p), *[1] * (p.ndim - 1)) * torch.rand(1, *p.shape[1:]))
    return model


def checkpoint(model: nn.Module, **args: Any) -> dict[str, Any]:
    """As timm's train.py saves it, with a metric of numpy's and a path among the arguments."""
    given = Namespace(model="test_vit", output=Path("/x"), device=torch.device("cpu"), mean=None, **args)
    return {
        "epoch": 3,
        "arch": "test_vit",
        "state_dict": model.state_dict(),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "args": given,
        "metric": np.float64(98.5),
        "history": np.array([1.5, 2.5]),
    }


@pytest.fixture
def timm_folder(tmp_path: Path) -> Path:
    """The output folder of timm's train.py."""
    folder = tmp_path / "output"
    folder.mkdir()
    torch.save(checkpoint(trained(), num_classes=3), folder / "last.pth.tar")
    torch.save(checkpoint(trained(), num_classes=3), folder / "model_best.pth.tar")
    args = {"model": "test_vit", "num_classes": 3, "img_size": None, "input_size": [3, 48, 64], "gp": "avg", "lr": 0.1}
    (folder / "args.yaml").write_text(yaml.safe_dump(args | {"mean": [0.1, 0.2, 0.3], "model_kwargs": {"depth": 4}}))
    return folder


def made(path: Path, role: str = "teacher", name: str = "test_vit", **kwargs: Any) -> nn.Module:
    spec = Model(model=name, weights=str(path), kwargs=VIT | kwargs if name == "test_vit" else kwargs)
    return build_model(spec, channels=3, image_size=(48, 48), classes=3, where=role)[0]


def refused(act: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as error:
        act(*args, **kwargs)
    return str(error.value)


# ---------------------------------------------------------------- what stands beside the tensors


@pytest.mark.parametrize("new_zip", [True, False])
def test_numbers_paths_and_arguments_beside_the_tensors_are_read_past(tmp_path: Path, new_zip: bool) -> None:
    model = trained()
    torch.save(checkpoint(model), tmp_path / "w.pth.tar", _use_new_zipfile_serialization=new_zip)
    contents = read_file(tmp_path / "w.pth.tar")
    assert not isinstance(contents["metric"], np.generic) and not isinstance(contents["history"], np.ndarray)
    assert not isinstance(vars(contents["args"])["output"], pathlib.PurePath), "nothing is made but a stand-in"
    loaded = made(tmp_path / "w.pth.tar").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


class Payload:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


class Attribute:
    """Calls what `getattr` finds in a path: a stand-in for either must not make it possible."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return getattr, (self.trace, "touch")


class Call:
    def __init__(self, inner: Any):
        self.inner = inner

    def __reduce__(self) -> Any:
        return self.inner, ()


@pytest.mark.parametrize("payload", [Payload, Attribute, lambda trace: Call(trace.touch)])
def test_no_code_in_a_file_is_run(tmp_path: Path, payload: Callable[[Path], Any]) -> None:
    trace, file = tmp_path / "trace", tmp_path / "w.pt"
    torch.save({"w": torch.ones(2), "args": Namespace(model=payload(trace))}, file)
    try:
        read_file(file)
    except UserError as error:
        assert str(file) in str(error)
    assert train_arguments(file) == {} and not trace.exists()


def test_any_other_object_is_refused_by_its_name(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "x": Fraction(1, 2)}, tmp_path / "w.pt")
    told = refused(read_weights, tmp_path / "w.pt", "teacher")
    assert "contains fractions.Fraction besides tensors and is not opened: such objects can run code" in told


# ---------------------------------------------------------------- what train.py says


def test_what_a_checkpoint_and_args_yaml_say(timm_folder: Path, tmp_path: Path) -> None:
    assert train_arguments(timm_folder / "last.pth.tar") == {"model": "test_vit", "num_classes": 3}
    said = train_arguments(timm_folder / "args.yaml")
    assert (said["gp"], said["mean"], said["model_kwargs"]) == ("avg", [0.1, 0.2, 0.3], {"depth": 4})
    assert "img_size" not in said and "lr" not in said
    told = dict(part.split("=", 1) for part in shlex.split(as_overrides(said, timm_folder / "a b.pt", "teacher")))
    assert told["teacher.weights"] == str(timm_folder / "a b.pt") and json.loads(told["teacher.image_size"]) == [48, 64]
    assert json.loads(told["teacher.kwargs"]) == {"global_pool": "avg", "depth": 4}
    for text in ("[1]", "model: nothing-of-timm\nnum_classes: three", "model: !!python/name:os.system", "a: [", "\0"):
        (tmp_path / "args.yaml").write_text(text)
        assert train_arguments(tmp_path / "args.yaml") == {}
    torch.save({"arch": "visiontransformer", "args": {"num_classes": 5}}, tmp_path / "w.pt")
    assert train_arguments(tmp_path / "w.pt") == {"num_classes": 5} and train_arguments(tmp_path / "nowhere.pt") == {}


def test_a_file_or_train_py_s_folder_in_place_of_a_name(
    tiny_recipe: dict[str, Any], timm_folder: Path, tmp_path: Path
) -> None:
    best = timm_folder / "model_best.pth.tar"

    def told_of(name: object, role: str = "teacher") -> str:
        return refused(check_config, tiny_recipe | {role: {"model": str(name), "weights": "pretrained"}}, "test")

    told = told_of(best)
    assert f"test: teacher.model: {best} is a file. model_best.pth.tar says: model test_vit, num_classes 3." in told
    assert told.endswith(f"teacher.model=test_vit teacher.weights={best}")
    told = told_of(timm_folder)
    assert "contains no model" in told and f"teacher.model=test_vit teacher.weights={best}" in told
    (tmp_path / "plain").mkdir()
    torch.save(trained().state_dict(), tmp_path / "plain" / "w.pth")
    assert f"student.model=NAME student.weights={tmp_path / 'plain' / 'w.pth'}" in told_of(
        tmp_path / "plain", "student"
    )
    (timm_folder / "config.json").write_text("{}")
    (timm_folder / "model.safetensors").touch()
    assert f"use its folder: teacher.model={timm_folder}" in told_of(timm_folder / "model.safetensors")


def test_settings_that_are_told_are_right(recipe_file: Path, timm_folder: Path) -> None:
    model = trained(global_pool="avg", img_size=(48, 64))
    for file in timm_folder.glob("*.tar"):
        torch.save({"state_dict": model.state_dict()}, file)
    told = refused(load_recipe, str(recipe_file), [f"teacher.model={timm_folder}"])
    assert "args.yaml says: model test_vit, num_classes 3, input_size" in told
    settings = shlex.split(told.split("weights to the file: ")[1])

    def build(changes: list[str]) -> nn.Module:
        spec = load_recipe(str(recipe_file), changes).teacher
        assert spec is not None and spec.image_size == (48, 64) and spec.mean == (0.1, 0.2, 0.3)
        return build_model(spec, channels=3, image_size=(48, 64), classes=None, where="teacher")[0]

    loaded = build(settings).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    assert "fc_norm.weight" in refused(build, [*settings, "teacher.kwargs={depth: 4}"]), "the argument does decide"


def test_a_folder_is_no_file_of_weights(cli: Callable[..., Any], timm_folder: Path, tmp_path: Path) -> None:
    told = refused(read_weights, timm_folder, "teacher")
    assert told == (
        f"teacher.weights: {timm_folder} is a folder, not a weights file; use a file in it, "
        f"such as {timm_folder / 'model_best.pth.tar'}"
    )
    (tmp_path / "photos").mkdir()
    shown = cli("import", tmp_path / "photos", "--model", "resnet18", "--out", tmp_path / "out")
    assert shown.code == 2 and "is a folder, not a weights file, and no file in it ends in" in shown.err
    assert "Did you mean `last.pth.tar`" in refused(read_weights, timm_folder / "lst.pth.tar", "teacher")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("hf-hub:timm/resnet18.a1_in1k", r"teacher.model: .* Its name in timm is `resnet18.a1_in1k`"),
        ("timm/resnet18.a1_in1k", r"Its name in timm is `resnet18.a1_in1k`"),
        ("hf-hub:me/vit@v2", r"`hf download me/vit --revision v2 --local-dir vit`, then use its folder, ./vit"),
        ("hf_hub:me/resnet18", r"`hf download me/resnet18 --local-dir resnet18`, then use its folder, ./resnet18"),
        ("local-dir:models/vit", r"Use the folder's path: models/vit"),
        ("models/vit", r"timm has no model `models/vit`, and there is no such folder"),
        ("resnet5O", r"timm has no model `resnet5O`. Did you mean"),
    ],
)
def test_names_of_the_hub(tiny_recipe: dict[str, Any], name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_config(tiny_recipe | {"teacher": {"model": name}}, "test")


# ---------------------------------------------------------------- weights that do not fit


def test_a_wrong_depth_is_told_under_the_prefix_with_what_the_file_says(tmp_path: Path) -> None:
    """The file has a third of the model's names: a prefix counts for the message whatever its size."""
    torch.save(checkpoint(trained(), num_classes=3), tmp_path / "w.pth.tar")
    told = refused(made, tmp_path / "w.pth.tar", depth=12)
    whole, missing = (len(timm.create_model("test_vit", depth=d).state_dict()) for d in (12, 4))
    assert (
        f"{missing} of {whole} tensors matched; {whole - missing} missing (blocks." in told and "left over" not in told
    )
    assert "The file says: model test_vit, num_classes 3." in told and "prefix" not in told


def test_names_that_are_quite_others(tmp_path: Path) -> None:
    torch.save({"encoder.a.weight": torch.ones(3)}, tmp_path / "w.pt")
    told = refused(made, tmp_path / "w.pt", name="test_resnet")
    assert (
        "0 of " in told and "1 left over (encoder.a.weight)" in told and "or set teacher.prefix to the prefix" in told
    )


def backbone(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}


def test_a_missing_classifier_is_not_what_is_wrong_with_a_backbone(tmp_path: Path) -> None:
    state = backbone(trained())
    torch.save({"model": state | {"decoder_embed.weight": torch.ones(8, 4)}}, tmp_path / "mae.pth")
    told = refused(made, tmp_path / "mae.pth")
    assert f"{len(state)} of {len(state)} tensors matched; 1 left over (decoder_embed.weight)." in told
    assert "head" not in told and "MAE's decoder, save the file without them" in told
    torch.save(state | {"norm.bias": torch.ones(5)}, tmp_path / "other.pth")
    told = refused(made, tmp_path / "other.pth")
    assert " missing (" not in told and "norm.bias is (5,) in the file" in told and "decoder" not in told
    torch.save(state, tmp_path / "bare.pth")
    told = refused(made, tmp_path / "bare.pth", num_classes=3)
    assert "2 missing (head.bias, head.weight)" in told, "of a class count that was asked for it is the whole matter"


def test_a_prefix_with_and_without_its_dot() -> None:
    model = trained()
    flat = {f"state_dict.model.{name}": value for name, value in model.state_dict().items()} | {"x": torch.ones(1)}
    assert find_prefix(model, flat, Path("w.pt"), "teacher") == "state_dict.model."
    assert as_prefix("state_dict.model", flat) == as_prefix("state_dict.model.", flat) == "state_dict.model."
    assert as_prefix("state_dict.mod", flat) == "state_dict.mod" and as_prefix("", flat) == ""
    assert as_prefix("nothing", flat) == "nothing"
    load_weights(model, model.state_dict(), Path("w.pt"), "teacher")


# ---------------------------------------------------------------- a teacher without the classes


@pytest.mark.parametrize("method", ["kd", "dkd", "ofa"])
def test_a_backbone_with_a_loss_on_logits_is_shown_the_way_to_a_head(method: str) -> None:
    student, teacher = timm.create_model("test_resnet", num_classes=3), trained(num_classes=0)
    told = refused(Distiller, student, teacher, {method: {}}, image_size=(48, 48))
    assert f"{method}: the teacher test_vit has no classifier." in told
    assert "`scalekd head`" in told and "teacher.head=fit" in told and "scalekd, dfm, cap, fd" in told
    told = refused(Distiller, student, trained(num_classes=5), {method: {}}, image_size=(48, 48))
    assert "3 classes" in told and "fit it a classifier for yours (`scalekd head`, or teacher.head=fit)" in told
