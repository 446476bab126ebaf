"""Exported students: timm and onnxruntime give the same outputs, and the card says all that is needed."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from rich.console import Console

from scalekd.common.errors import UserError
from scalekd.config.recipe import check_config
from scalekd.distill.build import build
from scalekd.distill.run import DistillationRun
from scalekd.models import student_file
from scalekd.models.student_file import export_onnx, export_student, load_student
from scalekd.models.weights.match import sha256_of
from scalekd.runs.students import evaluate_student, student_card

STUDENTS: dict[str, dict[str, Any]] = {
    "cnn": {"student": {"model": "test_resnet"}},
    "vit": {"student": {"model": "test_vit", "kwargs": {"class_token": False, "global_pool": "avg", "img_size": 48}}},
    "grey": {"student": {"model": "test_convnext"}, "data": {"channels": 1}},
}


def student_run(recipe: dict[str, Any], kind: str) -> DistillationRun:
    """A student whose norms and biases are not at their initial values."""
    recipe |= {"losses": {"ce": {}}, "teacher": None, "student": STUDENTS[kind]["student"]}
    recipe["data"] |= STUDENTS[kind].get("data", {})
    run = build(check_config(recipe, "test"), torch.device("cpu"))
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*run.distiller.student.parameters(), *run.distiller.student.buffers()):
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.2 * torch.rand_like(tensor))
    return run


@pytest.fixture(params=STUDENTS)
def run(request: pytest.FixtureRequest, tiny_recipe: dict[str, Any]) -> DistillationRun:
    return student_run(tiny_recipe, request.param)


def test_timm_gives_the_same_logits(run, tmp_path):
    student, path = run.deployed, tmp_path / "student.safetensors"
    assert export_student(student, path, student_card(run) | {"top1": 12.5}) == 0.0
    card = json.loads(path.with_suffix(".json").read_text())
    model = timm.create_model(card["model"], checkpoint_path=str(path), **card["kwargs"]).eval()
    images = torch.randn(3, len(card["mean"]), *card["image_size"])
    with torch.no_grad():
        assert torch.equal(model(images), student.eval()(images))
        assert torch.equal(load_student(tmp_path)[0](images), student(images))


def test_card_is_complete(run, tmp_path):
    path = tmp_path / "student.safetensors"
    export_student(run.deployed, path, student_card(run) | {"top1": 12.5})
    card = json.loads(path.with_suffix(".json").read_text())
    channels = run.config.data.channels
    assert card["model"] == run.config.student.model
    assert card["kwargs"]["num_classes"] == 3
    assert card["kwargs"]["in_chans"] == channels
    assert card["classes"] == ["ant", "bee", "cat"]
    assert card["image_size"] == [48, 48]
    for key, values in (("mean", run.distiller.student_mean), ("std", run.distiller.student_std)):
        assert torch.equal(torch.tensor(card[key]), values.flatten())
        assert len(card[key]) == 1 or all(len(str(v)) <= 5 for v in card[key]), "0.485 as people write it"
    assert card["mean"] == card["std"] == [0.5] * channels
    assert (card["interpolation"], card["crop_pct"]) == ("bicubic", 0.875)
    assert (card["top1"], card["teacher"], card["losses"]) == (12.5, None, {"ce": {}})
    assert {"command", "scalekd", "torch", "timm", "weights"} <= set(card["provenance"])
    assert card["sha256"] == sha256_of(path)


def test_export_leaves_the_student_as_it_was(tiny_recipe, tmp_path):
    run = student_run(tiny_recipe, "cnn")
    student = run.distiller.student.train()
    export_student(student, tmp_path / "student.safetensors", student_card(run))
    assert student.training


@pytest.mark.skipif(os.name != "posix", reason="POSIX file modes")
def test_files_can_be_read_by_others(tiny_recipe, tmp_path):
    run = student_run(tiny_recipe, "cnn")
    old = os.umask(0o022)
    try:
        export_student(run.deployed, tmp_path / "student.safetensors", student_card(run))
    finally:
        os.umask(old)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.glob("student.*")} == {0o644}


def write_student(recipe: dict[str, Any], folder: Path) -> Path:
    run = student_run(recipe, "cnn")
    export_student(run.deployed, folder / "student.safetensors", student_card(run))
    return folder / "student.safetensors"


@pytest.mark.parametrize("missing", ["student.safetensors", "student.json"])
def test_missing_file(tiny_recipe, tmp_path, missing):
    write_student(tiny_recipe, tmp_path)
    (tmp_path / missing).unlink()
    lacking = r"has no student\.safetensors with its \.json"
    for path, told in ((tmp_path, lacking), (tmp_path / "student.safetensors", f"{lacking}|does not exist")):
        with pytest.raises(UserError, match=told):
            load_student(path)


@pytest.mark.parametrize(
    ("damaged", "told"),
    [
        ("student.safetensors", "does not fit its card .*student.json"),
        ("student.json", "is not a valid student card"),
    ],
)
@pytest.mark.parametrize("left", [0, 200])
def test_damaged_file(tiny_recipe, tmp_path, damaged, told, left):
    write_student(tiny_recipe, tmp_path)
    (tmp_path / damaged).write_bytes((tmp_path / damaged).read_bytes()[:left])
    with pytest.raises(UserError, match=f"{damaged} {told}"):
        load_student(tmp_path)


def test_card_of_another_model(tiny_recipe, tmp_path):
    card = write_student(tiny_recipe, tmp_path).with_suffix(".json")
    card.write_text(card.read_text().replace('"num_classes": 3', '"num_classes": 4'))
    with pytest.raises(UserError, match="does not fit its card"):
        load_student(tmp_path)


def test_folder_that_cannot_be_written(tiny_recipe, tmp_path):
    run = student_run(tiny_recipe, "cnn")
    with pytest.raises(UserError, match="cannot write"):
        export_student(run.deployed, tmp_path / "nowhere" / "student.safetensors", student_card(run))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_onnx_gives_the_same_logits(tiny_recipe, tmp_path, kind):
    onnxruntime = pytest.importorskip("onnxruntime", reason=student_file.ONNX_MISSING)
    pytest.importorskip("onnxscript", reason=student_file.ONNX_MISSING)
    run = student_run(tiny_recipe, kind)
    student, path = run.distiller.student.train(), tmp_path / "student.onnx"
    card = student_card(run)
    assert export_onnx(student, path, card) < 1e-5
    assert student.training
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        images = torch.randn(batch, len(card["mean"]), *card["image_size"])
        with torch.no_grad():
            expected = student.eval()(images)
        logits, _ = session.run(["logits", "features"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-5, atol=1e-5)


def test_onnx_without_its_packages(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    run = student_run(tiny_recipe, "cnn")
    with pytest.raises(UserError, match=r"pip install 'scalekd\[onnx\]'"):
        export_onnx(run.deployed, tmp_path / "student.onnx", student_card(run))


def test_a_graph_that_computes_something_else_is_refused(tiny_recipe, tmp_path, monkeypatch):
    run = student_run(tiny_recipe, "cnn")
    monkeypatch.setattr(student_file, "TOLERANCE", 1e-12)
    with pytest.raises(UserError, match=r"its outputs under onnxruntime differ .* the file was removed"):
        export_onnx(run.deployed, tmp_path / "student.onnx", student_card(run))
    assert not (tmp_path / "student.onnx").exists()
    assert not student_file.is_close(float("nan"), torch.zeros(1))


def test_a_student_that_diverged_is_not_evaluated(tiny_recipe, tmp_path, image_folder):
    run = student_run(tiny_recipe, "cnn")
    with torch.no_grad():
        next(run.deployed.parameters()).fill_(float("nan"))
    export_student(run.deployed, tmp_path / "student.safetensors", student_card(run))
    with pytest.raises(UserError, match="the student's outputs are not finite, so its accuracy has no meaning"):
        evaluate_student(tmp_path, str(image_folder / "val"), "cpu", Console(quiet=True))
