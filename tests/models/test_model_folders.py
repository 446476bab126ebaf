"""Model folders as `model` in a recipe: which of their values are used, and which contradictions are errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from timm.models import save_for_hf

from scalekd.common.errors import UserError
from scalekd.common.sections import to_yaml
from scalekd.config.recipe import check_config
from scalekd.distill.build import build
from scalekd.models.student_file import export_student
from scalekd.models.weights.folder import beside, read_folder, with_folders
from scalekd.models.weights.match import sha256_of

VIT = {"depth": 4, "img_size": 64, "num_classes": 3}
CLASSES = ["blue", "green", "red"]


def trained(name: str, **kwargs: Any) -> torch.nn.Module:
    """A model in which no tensor is at its initial value, with products of matrices in place of noise."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand(len(p), *[1] * (p.ndim - 1)) * torch.rand(1, *p.shape[1:]))
    return model


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """As a finished run leaves it, of a ViT for 64 pixels."""
    card = {
        "model": "test_vit",
        "kwargs": VIT | {"img_size": [64, 64], "in_chans": 3, "drop_path_rate": 0.1},
        "classes": CLASSES,
        "image_size": [64, 64],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }
    (tmp_path / "run").mkdir()
    export_student(trained("test_vit", **VIT), tmp_path / "run" / "student.safetensors", card)
    return tmp_path / "run"


@pytest.fixture(params=["safetensors", "bin"])
def hf_folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    model = trained("test_vit", depth=4, num_classes=3)
    data = {"mean": (0.11, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.93, "interpolation": "bilinear"}
    config = {"label_names": CLASSES, "model_args": {"depth": 4}, "pretrained_cfg": data}
    save_for_hf(model, tmp_path / "hf", model_config=config, safe_serialization=request.param == "safetensors")
    return tmp_path / "hf"


def change(folder: Path, name: str, **values: Any) -> None:
    told = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps({k: v for k, v in told.items() if v is not None}))


def teacher(recipe: dict[str, Any], folder: Path, **more: Any) -> dict[str, Any]:
    return recipe | {"teacher": {"model": str(folder)} | more}


def test_a_run_s_folder_is_written_out(tiny_recipe, run_folder):
    config = check_config(teacher(tiny_recipe, run_folder), "test")
    assert config.teacher is not None
    assert config.teacher.model_dump(exclude_defaults=True) == {
        "model": "test_vit",
        "weights": str(run_folder / "student.safetensors"),
        "kwargs": {"depth": 4, "drop_path_rate": 0.1},
        "image_size": (64, 64),
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
    }
    again = check_config(yaml.safe_load(to_yaml(config)), "again")
    assert again.model_copy(update={"losses": config.losses}) == config  # its losses have no option left out


def test_the_recipe_of_a_run_needs_the_weights_alone(tiny_recipe, run_folder):
    text = to_yaml(check_config(teacher(tiny_recipe, run_folder), "test"))
    (run_folder / "student.json").unlink()
    run = build(check_config(yaml.safe_load(text), "test"), torch.device("cpu"))
    assert run.distiller.teacher_view is not None
    state = load_file(run_folder / "student.safetensors")
    assert all(torch.equal(v, state[k]) for k, v in run.distiller.teacher_view.model.state_dict().items())
    assert run.distiller.teacher_size == (64, 64) and run.loaded["teacher"].matched == len(state)
    assert run.distiller.teacher_mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_a_folder_of_timm_s_is_written_out_and_loaded(tiny_recipe, hf_folder):
    config = check_config(teacher(tiny_recipe, hf_folder), "test")
    assert config.teacher is not None
    assert config.teacher.model == "test_vit" and config.teacher.kwargs["depth"] == 4
    assert not {"num_classes", "in_chans", "img_size"} & config.teacher.kwargs.keys()
    assert config.teacher.image_size == tuple(timm.get_pretrained_cfg("test_vit").input_size[1:])
    assert (config.teacher.mean, config.teacher.std) == ((0.11, 0.2, 0.3), (0.4, 0.5, 0.6))
    run = build(config, torch.device("cpu"))
    file = next(p for p in hf_folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    assert run.distiller.teacher_view is not None
    assert all(torch.equal(v, state[k]) for k, v in run.distiller.teacher_view.model.state_dict().items())
    assert run.loaded["teacher"].sha256 == sha256_of(file)
    told = beside(file)
    assert told is not None and (told.classes, told.crop_pct, told.interpolation) == (CLASSES, 0.93, "bilinear")


def test_an_older_configuration_on_one_level(hf_folder):
    config = json.loads((hf_folder / "config.json").read_text())
    flat = {"architecture": "test_vit", "num_features": 64} | config["pretrained_cfg"]
    (hf_folder / "config.json").write_text(json.dumps(flat))
    told = read_folder(hf_folder, "teacher")
    assert (told.model, told.kwargs, told.mean, told.channels) == ("test_vit", {}, [0.11, 0.2, 0.3], 3)


def test_a_student_starts_from_a_folder_s_weights(tiny_recipe, run_folder):
    recipe = tiny_recipe | {"student": {"model": str(run_folder)}, "teacher": None, "losses": {"ce": {}}}
    config = check_config(recipe, "test")
    assert config.student.weights == str(run_folder / "student.safetensors") and config.student.image_size is None
    run = build(config, torch.device("cpu"))
    assert run.loaded["student"].head is None and run.loaded["student"].matched == run.loaded["student"].total
    recipe = recipe | {"student": {"model": str(run_folder), "weights": "random"}}
    assert check_config(recipe, "test").student.weights == "random"


def test_what_the_recipe_says_wins(tiny_recipe, run_folder):
    file = str(run_folder / "student.safetensors")
    own = {"mean": [0.5, 0.5, 0.5], "image_size": 96, "kwargs": {"drop_path_rate": 0.0, "depth": 4}, "weights": file}
    config = check_config(teacher(tiny_recipe, run_folder, **own), "test")
    assert config.teacher is not None
    assert config.teacher.mean == (0.5, 0.5, 0.5) and config.teacher.std == (0.4, 0.5, 0.6)
    assert config.teacher.image_size == 96 and config.teacher.kwargs == {"depth": 4, "drop_path_rate": 0.0}
    pretrained = check_config(teacher(tiny_recipe, run_folder, weights="pretrained"), "test").teacher
    assert pretrained is not None and pretrained.weights == file


@pytest.mark.parametrize(
    "teacher_says, data_says, told",
    [
        ({"kwargs": {"depth": 5}}, {}, r"teacher\.kwargs: depth is 5 here and 4 in .*run\. Remove it, or remove all"),
        (
            {"weights": "other.pt"},
            {},
            r"teacher\.weights is other\.pt, but teacher\.model is .*run, which has its own weights",
        ),
        ({}, {"channels": 1}, r".*run needs images with 3 channels, but data\.channels is 1; set data\.channels=3"),
    ],
)
def test_what_contradicts_the_folder_is_refused(tiny_recipe, run_folder, teacher_says, data_says, told):
    recipe = teacher(tiny_recipe, run_folder, **teacher_says)
    recipe["data"] = recipe["data"] | data_says
    with pytest.raises(UserError, match=f"test: {told}"):
        check_config(recipe, "test")


def test_folders_that_hold_no_model(tmp_path, run_folder, hf_folder):
    def refused(folder: Path) -> str:
        with pytest.raises(UserError, match=r"^teacher\.model: ") as error:
            read_folder(folder, "teacher")
        return str(error.value)

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "neither student.json with student.safetensors (from a scalekd run) nor config.json" in refused(empty)
    (empty / "last.pth").touch()
    assert f"teacher.model=NAME teacher.weights={empty / 'last.pth'}" in refused(empty)
    (empty / "head.json").touch()
    assert f"set teacher.head={empty}" in refused(empty)
    (run_folder / "student.safetensors").unlink()
    assert f"has no student.safetensors; create it with `scalekd export {run_folder}`" in refused(run_folder)
    change(hf_folder, "config.json", architecture="tset_vit")
    assert "timm has no model `tset_vit`. Did you mean `test_vit`" in refused(hf_folder)
    change(hf_folder, "config.json", architecture=None, model_type="vit")
    assert "has no preprocessor_config.json with image_mean" in refused(hf_folder)
    for text in (
        "",
        "[1]",
        "{",
        '{"architecture": "test_vit", "pretrained_cfg": 3}',
        '{"architecture": "test_vit", "input_size": "x"}',
    ):
        (hf_folder / "config.json").write_text(text)
        refused(hf_folder)
    (run_folder / "student.json").write_text("{}")
    assert "is not a valid student card" in refused(run_folder)


def test_names_of_timm_s_come_first(tmp_path, monkeypatch, tiny_recipe):
    (tmp_path / "test_vit").mkdir()
    monkeypatch.chdir(tmp_path)
    assert with_folders(tiny_recipe) == tiny_recipe
    with pytest.raises(UserError, match=r"teacher\.model: test_vit contains no model"):
        with_folders(teacher(tiny_recipe, Path("./test_vit")) | {"teacher": {"model": "./test_vit"}})
    with pytest.raises(UserError, match="timm has no model `runs/teacher`, and there is no such folder"):
        check_config(teacher(tiny_recipe, Path("runs/teacher")), "test")


def test_weights_that_are_not_those_of_their_card(tiny_recipe, run_folder):
    change(run_folder, "student.json", sha256="0" * 64)
    with pytest.raises(UserError, match=r"student\.safetensors does not match the sha256 in the card next to it"):
        build(check_config(teacher(tiny_recipe, run_folder), "test"), torch.device("cpu"))


def test_from_the_command_line_to_the_screen(cli, recipe_file, run_folder):
    change(run_folder, "student.json", crop_pct=0.9)
    shown = cli(
        "train", recipe_file, "--teacher", run_folder, "--dry-run", "teacher.kwargs={}", "teacher.image_size=48"
    )
    told = " ".join(shown.out.split())
    assert shown.code == 0, shown.err
    assert "test_resnet <- test_vit" in told and "mean 0.100 0.200 0.300, std 0.400 0.500 0.600" in told
    assert (
        "trained for 64x64" in told
        and "it was validated with crop_pct 0.9, bicubic (set them in `augment`, for both models)" in told
    )


def test_a_head_for_a_folder_s_model(cli, recipe_file, image_folder, run_folder, tmp_path):
    change(run_folder, "student.json", crop_pct=0.8)
    out = tmp_path / "head"
    fitted = cli("head", run_folder, "--data", image_folder, "--out", out, "--cache", tmp_path / "cache")
    assert fitted.code == 0, fitted.err
    card = json.loads((out / "head.json").read_text())
    assert (card["model"], card["kwargs"]) == ("test_vit", {"depth": 4, "drop_path_rate": 0.1})
    assert (card["image_size"], card["mean"], card["crop_pct"]) == ([64, 64], [0.1, 0.2, 0.3], 0.8)
    used = ("--teacher", run_folder, "teacher.kwargs={}", f"teacher.head={out}", "--dry-run")
    shown = cli("train", recipe_file, *used)
    assert shown.code == 0, shown.err
    assert card["head_sha256"][:12] in shown.out and "fitted on 24 labels" in " ".join(shown.out.split())
    refused = cli("head", run_folder, "--data", image_folder, "--out", tmp_path / "b", "--kwargs", "{depth: 3}")
    assert refused.code == 2 and "--kwargs: depth is 3 here and 4 in" in refused.err
