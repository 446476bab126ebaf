"""An exported student as a folder in timm's format: timm alone gives the same logits, labels and preprocessing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from exported_students import exported
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from scalekd.data.options import Augment, Data
from scalekd.data.transforms import eval_transform
from scalekd.models import student_file
from scalekd.models.create import create
from scalekd.models.inputs import scaled
from scalekd.models.licences import derived, explained, is_non_commercial, licence_of
from scalekd.models.student_file import export_student, load_student
from scalekd.models.timm_folder import descriptions, write_timm_folder
from scalekd.models.weights.folder import read_folder

SWIN = {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3}
# timm name, (height, width), channels, classes (0: no classifier), keyword arguments
STUDENTS: list[tuple[str, tuple[int, int], int, int, dict[str, Any]]] = [
    ("test_resnet", (48, 48), 3, 3, {}),
    ("test_resnet", (40, 64), 1, 0, {"global_pool": "max"}),
    ("test_byobnet", (64, 48), 3, 7, {}),
    ("test_convnext", (48, 48), 1, 3, {"drop_path_rate": 0.2}),
    ("test_convnext2", (64, 64), 3, 0, {}),
    ("test_efficientnet", (48, 48), 3, 3, {"drop_rate": 0.3}),
    ("test_efficientnet_gn", (48, 48), 3, 1000, {}),
    ("test_mambaout", (64, 64), 3, 3, {}),
    ("test_maxvit", (64, 64), 3, 3, {}),
    ("test_coatnet", (128, 128), 1, 3, {}),
    ("test_nfnet", (48, 48), 3, 2, {}),
    ("test_vit", (48, 48), 3, 3, {"class_token": False, "global_pool": "avg"}),
    ("test_vit", (32, 64), 1, 0, {"dynamic_img_size": True}),
    ("test_vit3", (48, 48), 3, 3, {}),
    ("test_vit_relpos", (48, 48), 3, 3, {}),
    ("vit_tiny_patch16_224", (48, 48), 3, 3, VIT | {"patch_size": 8, "dynamic_img_size": True}),
    ("deit_tiny_distilled_patch16_224", (64, 64), 3, 3, VIT),
    ("swin_tiny_patch4_window7_224", (64, 64), 3, 3, SWIN),
    ("test_efficientnet_evos", (48, 48), 3, 3, {}),
    ("test_vit4", (48, 48), 3, 5, {}),
    ("mlp_mixer", (32, 32), 3, 3, {"patch_size": 8, "num_blocks": 2, "embed_dim": 32}),
    ("vit_wide_last", (64, 64), 3, 3, VIT | {"last_dim": 64, "last_heads": 2, "drop_path_rate": 0.1}),
    ("vit_lift", (64, 64), 1, 0, VIT | {"last_dim": 64}),
    ("mobilenetv3_small_050", (64, 64), 3, 3, {}),
    ("regnetx_002", (64, 64), 1, 3, {}),
    ("edgenext_xx_small", (64, 64), 3, 3, {}),
]


@pytest.mark.parametrize(
    "name, size, channels, classes, kwargs", STUDENTS, ids=[f"{s[0]}-{s[1][0]}x{s[1][1]}" for s in STUDENTS]
)
def test_timm_alone_gives_the_same_student(tmp_path, name, size, channels, classes, kwargs):
    student, card = exported(tmp_path, name, size, channels, classes, kwargs)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, channels, *size)
    with torch.no_grad():
        expected = student(images)
        assert torch.equal(loaded(images), expected) and expected.std() > 0
    assert list(loaded.pretrained_cfg.get("label_names", [])) == card["classes"]
    assert loaded.pretrained_cfg["license"] == "unknown" and "tag" not in loaded.pretrained_cfg

    shown = Data.model_validate({"image_size": size, "channels": channels})
    ours = eval_transform(shown, Augment(interpolation=card["interpolation"], crop_pct=card["crop_pct"]))
    theirs = create_transform(**resolve_model_data_config(loaded))
    mean, std = (torch.tensor(card[key]).view(-1, 1, 1) for key in ("mean", "std"))
    for shape in ((90, 70, 3), (50, 200, 3)):
        pixels = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
        image = Image.fromarray(pixels).convert("L" if channels == 1 else "RGB")
        assert torch.equal((scaled(ours(image)) - mean) / std, theirs(image))


def test_a_borrowed_crop_mode_is_not_kept(tmp_path):
    """timm's own weights of this model squash the image to a square; scalekd validates with a centre crop."""
    small = {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]}
    exported(tmp_path, "convnext_tiny.in12k_ft_in1k_384", (32, 32), kwargs=small)
    cfg = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert cfg["crop_mode"] == "center" and not {"test_input_size", "test_crop_pct"} & cfg.keys()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    exported(tmp_path, "test_resnet", (48, 48))
    return tmp_path


def test_a_student_trained_with_channels_last_gets_its_config(tmp_path, monkeypatch, capsys):
    """Its kernels may round otherwise than those of the file, which timm and scalekd load alike."""
    student = timm.create_model("test_resnet", num_classes=3).eval()
    monkeypatch.setattr(student, "forward", lambda x: type(student).forward(student, x) * (1 + 1e-6))
    card = {"model": "test_resnet", "kwargs": {"num_classes": 3}, "classes": ["a", "b", "c"], "image_size": [64, 64]}
    card |= {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    difference = export_student(student, tmp_path / "student.safetensors", card)
    assert 0 < difference < 1e-4
    assert (tmp_path / "config.json").is_file() and capsys.readouterr().err == ""


def test_the_second_name_takes_no_space(folder, monkeypatch):
    names = [folder / "student.safetensors", folder / "model.safetensors"]
    assert names[0].samefile(names[1]) and os.stat(names[0]).st_nlink == 2
    student, card = load_student(folder)
    export_student(student, names[0], card)  # again
    assert names[0].samefile(names[1]) and not list(folder.glob("*.part"))
    assert read_folder(folder, "teacher").weights == names[0]

    def none(*_: Any, **__: Any) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", none)
    export_student(student, names[0], card)
    assert not names[1].exists()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images), student(images))


def test_a_folder_of_an_earlier_version_loads(folder):
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    assert load_student(folder)[1]["classes"] == ["ant", "bee", "cat"]


def test_what_timm_cannot_load_gets_no_config(folder, monkeypatch, capsys):
    student, card = load_student(folder)
    other, _ = create("test_resnet", (48, 48), False, card["kwargs"], "student")
    monkeypatch.setattr(student_file, "load_timm_folder", lambda _: other)
    assert export_student(student, folder / "student.safetensors", card) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["student.json", "student.safetensors"]
    assert "timm cannot load" in capsys.readouterr().err


def test_a_link_in_place_of_a_file_is_replaced(folder, tmp_path):
    precious = tmp_path.parent / f"{tmp_path.name}-precious"
    precious.write_text("mine")
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
        (folder / name).symlink_to(precious)
    student, card = load_student_without_links(folder)
    write_timm_folder(student, folder / "student.safetensors", card)
    assert precious.read_text() == "mine" and not (folder / "config.json").is_symlink()


def load_student_without_links(folder: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    return load_student(folder / "student.safetensors")


def test_wordnet_numbers_are_described():
    assert descriptions(["n02123045", "n01440764"])["n02123045"] == "tabby, tabby cat"
    assert descriptions(["ant", "n01440764"]) == descriptions([]) == {}


@pytest.mark.parametrize(
    "name, licence, told",
    [
        ("convnextv2_atto.fcmae", "cc-by-nc-4.0", "cc-by-nc-4.0 (non-commercial)"),
        ("convnext_tiny.dinov3_lvd1689m", "dinov3-license", "dinov3-license (its own terms)"),
        ("convnext_tiny.eupe_lvd1689m", None, "fair-noncommercial-research-license (non-commercial)"),
        ("fastvit_mci0.apple_mclip", "apple-amlr", "apple-amlr (non-commercial)"),
        ("resnet18.a1_in1k", "apache-2.0", "apache-2.0"),
        ("res2net50_14w_8s.in1k", "unknown", "unknown"),
    ],
)
def test_licences_of_timm(name, licence, told):
    found = licence_of(timm.get_pretrained_cfg(name).to_dict())
    assert found == (licence or found) and explained(found) == told


def test_licences_of_what_was_made_from_others():
    assert licence_of(None) == licence_of({"license": None}) == derived([]) == derived(["unknown"]) == "unknown"
    assert derived(["mit", "cc-by-nc-4.0"]) == "unknown, made from cc-by-nc-4.0 and mit"
    assert is_non_commercial(derived(["mit", "cc-by-nc-4.0"])) and not is_non_commercial("apache-2.0")
    assert not any(
        map(is_non_commercial, ("nvidia-open-model-license", "qwen-community-1.0", "bsd-3-clause", "unknown"))
    )
