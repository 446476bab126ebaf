"""`scalekd quantize`: a run's student as int8, calibrated and trained, in all commands that take a student."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from exported_students import exported
from quick_quantising import FAST, make_quick
from rich.console import Console
from small_images import write_images
from whole_runs import CPU, TINY, Interrupted, assert_same, changed, events, final_state, start

import scalekd
from scalekd.common.stop import StopRequest
from scalekd.config.recipe import check_config
from scalekd.distill.rebuild import load_trained, read_recipe, rebuild
from scalekd.models.student_file import load_student
from scalekd.report.evaluate import look
from scalekd.report.quantized_section import quantized_block, quantized_rows, quantized_section
from scalekd.runs import quantize
from scalekd.runs.distillation import execute
from scalekd.runs.quantized_recipe import quantized_recipe
from scalekd.train import checkpoint, engine


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/ with a student that learnt from a teacher, with projectors; its 48 and 12 images."""
    root = tmp_path_factory.mktemp("quantize")
    write_images(root / "images" / "train", per_class=16)
    write_images(root / "images" / "val", per_class=4, seed=1)
    recipe = changed(copy.deepcopy(TINY), losses={"ce": {}, "kd": {}, "fd": {"stages": [4]}}, optim={"lr": 3e-3})
    recipe["data"] |= {"train": str(root / "images" / "train"), "val": str(root / "images" / "val")}
    execute(check_config(recipe, "test"), root / "run", CPU, Console(quiet=True), check=False, look=False)
    return root


@pytest.fixture(scope="module", autouse=True)
def one_trace():
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        yield


@pytest.fixture(scope="module")
def found(root: Path) -> Any:
    """The result of a quantisation with the teacher that was stopped after its second step and started again."""
    done, real = 0, engine.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        if done == 2:
            raise Interrupted
        done += 1
        return real(*args, **kwargs)

    def quantized() -> Any:
        return scalekd.quantize(root / "run", qat=True, epochs=1, train={"save_minutes": 0}, images=32, device="cpu")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "train_step", train_step)
        with pytest.raises(Interrupted):
            quantized()
    return quantized()


def test_a_quantised_run_resumes_exactly(root, found, tmp_path):
    config = read_recipe(root / "run" / "quantize" / "qat")
    assert (
        config.train.epochs == 1
        and config.optim.lr == pytest.approx(3e-5)
        and config.losses.keys() == {"ce", "kd", "fd"}
    )
    start(config.model_dump(mode="json"), tmp_path / "whole")
    assert_same(final_state(tmp_path / "whole"), final_state(root / "run" / "quantize" / "qat"))
    assert [event["step"] for event in events(root / "run" / "quantize" / "qat", "resumed")] == [2]


def test_the_methods_go_on_with_their_trained_parameters(root, found):
    before, after = (checkpoint.load(root / f / "last.pt")["methods"] for f in ("run", "run/quantize/qat"))
    assert before.keys() == after.keys() and before
    for key, value in before.items():
        assert (value - after[key]).abs().max() < 0.01  # a rate of 3e-5 for 6 steps; fresh ones are 0.1 apart


def test_the_result(root, found, capsys):
    assert list(found.rows) == ["float32", "ptq", "qat"] and found.way == "qat"
    assert found.file == root / "run" / "student.int8.onnx"
    assert found.file.read_bytes() == (root / "run" / "quantize" / "qat" / "student.int8.onnx").read_bytes()
    assert found.details == json.loads((root / "run" / "quantize.json").read_text())
    top1 = scalekd.evaluate(root / "run", data=root / "images" / "val", device="cpu").top1
    assert found.rows["float32"]["top1"] == pytest.approx(top1)
    for way, file in (("ptq", "ptq.onnx"), ("qat", "qat/student.int8.onnx")):
        path = root / "run" / "quantize" / file
        row = found.rows[way]
        assert row["top1"] == pytest.approx(scalekd.evaluate(path, data=root / "images" / "val", device="cpu").top1)
        assert row["bytes"] == path.stat().st_size and row["change"] == pytest.approx(row["top1"] - top1)
        weights = sum(
            w.data_type == onnx.TensorProto.INT8 and len(w.dims) > 1 for w in onnx.load(path).graph.initializer
        )
        layers = load_student(root / "run")[0].modules()
        assert weights == sum(isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) for module in layers)
    trained = found.rows["qat"]["trained"]  # the file beside the student that was trained
    assert trained["images"] == 12 and trained["same_class"] == 100 and trained["largest_difference"] < 0.05
    tried = found.details["calibration"]["tried"]
    assert tried.keys() == {"float32", "minmax", "entropy", "percentile"} and tried["minmax"]["images"] == 16
    of_teacher = {"model": "test_vit", "bytes": 1000, "latency_ms": {"1": FAST, "16": FAST}}
    assert found.details["teachers"] == {"teacher": of_teacher}
    left = {kind["operator"]: kind["count"] for kind in found.details["left_in_float"]}
    assert left == {"AveragePool": 3, "ReduceMean": 1}

    from scalekd.cli.quantize import notes, table

    lines = table(found)
    assert "int8, trained with the teacher" in lines[3] and f"{found.rows['qat']['top1']:.2f}" in lines[3]
    assert lines[4].startswith("teacher test_vit") and lines[4].split()[-2:] == ["1.50", "1.50"]
    assert lines[6] == "in float32: AveragePool x 3, ReduceMean x 1"
    where, few = notes(found, Path("run/quantize"))
    assert where == "all int8 files are in run/quantize: ptq.onnx is the calibrated one"
    assert few.startswith("12 validation images show large changes only")
    many = {"float32": found.rows["float32"] | {"images": 200}, "ptq": found.rows["ptq"]}
    assert notes(replace(found, rows=many), Path("run/quantize")) == []


def test_int8_files_in_use(root, found, cli, tmp_path):
    options = ["--device", "cpu"]
    assert cli("predict", found.file, root / "images" / "val", *options, "--csv", tmp_path / "p.csv").code == 0
    assert (tmp_path / "p.csv").read_text().count("\n") == 13
    result = cli("evaluate", found.file, "--data", root / "images" / "val", *options)
    assert f"top-1 {found.rows['qat']['top1']:.2f} %" in result.out
    features = [
        scalekd.embed(path, root / "images" / "val", device="cpu").features for path in (found.file, root / "run")
    ]
    assert features[0].shape == (12, 96)
    assert 0 < np.abs(features[0] - features[1]).max() < 0.2 * np.abs(features[1]).max()
    result = cli("export", root / "run" / "quantize" / "qat")
    assert result.code == 2 and "is a quantised run: its files are student.int8.onnx" in result.err
    result = cli("quantize", root / "run" / "quantize" / "qat")
    assert result.code == 2 and "is a quantised run itself" in result.err


def test_the_student_before_rounding(root, found):
    """Its own folder holds a plain timm student with nearly the accuracy of the int8 file."""
    plain, card = load_student(root / "run" / "quantize" / "qat")
    before, _ = load_student(root / "run")
    images = torch.randn(8, 3, 48, 48)
    with torch.no_grad():
        difference = (plain(images) - before(images)).abs().max()
    assert 0 < difference < 0.2 and "top1" not in card


def test_reports(root, found):
    assert [row[0] for row in quantized_rows(root / "run")] == [
        "float32",
        "int8, calibrated",
        "int8, trained with the teacher",
        "teacher, test_vit, float32",
    ]
    assert "1.50" in quantized_section(root / "run") and "ReduceMean x 1" in quantized_block(root / "run")
    scalekd.report(root / "run", device="cpu")
    assert "Size and speed" in (root / "run" / "report.html").read_text()
    assert "## Size and speed" in (root / "run" / "README.md").read_text()
    config = read_recipe(root / "run" / "quantize" / "qat")
    run = rebuild(config, CPU)
    state = checkpoint.load(root / "run" / "quantize" / "qat" / "last.pt")
    load_trained(run, state, Path("last.pt"))
    seen = run.validate(run.eval_batches(12, 0))
    assert seen["top1"] == state["progress"]["history"][-1]["top1"]
    assert look(run, run.deployed, most=4).map_images == 4  # as in the report of the quantised run


DAMAGED = [
    "",
    "[]",
    '{"rows": 3}',
    '{"rows": {"a": {"label": 1, "top1": "x", "latency_ms": [], "bytes": 1e400}}}',
    '{"rows": {"a": {"top1": 50, "latency_ms": {"1": {"median": null}}}}, "left_in_float": [1, {"operator": 2}]}',
    "[" * 5000,
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_leaves_rows_out(tmp_path, content):
    (tmp_path / "quantize.json").write_text(content)
    assert len(quantized_rows(tmp_path)) == ('"top1": 50' in content)
    quantized_section(tmp_path)


def test_recipes(root):
    config = read_recipe(root / "run")
    labels = quantized_recipe(config, root / "run", "qat-labels", "entropy", 64, 2, ["optim.lr=1e-4"])
    assert labels.teacher is None and labels.losses.keys() == {"ce"} and labels.optim.lr == 1e-4
    assert labels.quantize.calibration == "entropy" and labels.quantize.images == 64
    assert labels.student.weights == str(root / "run" / "student.safetensors")
    for key, value in (("ema", 0.9), ("compile", True), ("precision", "bf16")):
        with pytest.raises(scalekd.UserError, match=f"train.{key}: not with `quantize`"):
            check_config(changed(labels.model_dump(mode="json"), train={key: value}), "x")


# ------------------------------------------------ mistakes


def test_mistakes(root, found, tmp_path, cli, monkeypatch):
    def told(*arguments: Any) -> str:
        before = {p: p.stat().st_mtime_ns for p in (root / "run").rglob("*")}
        result = cli("quantize", *arguments)
        assert result.code == 2 and len(result.err.strip().splitlines()) <= 2, result.err
        assert before == {p: p.stat().st_mtime_ns for p in (root / "run").rglob("*")}
        return result.err

    run, few = root / "run", tmp_path / "few"
    assert "is no run's folder" in told(tmp_path)
    assert "`--images` 16: calibration needs 32 or more" in told(run, "--images", 16)
    write_images(few, per_class=10)
    few_images = told(run, "--data", few, "--val", root / "images" / "val")
    assert "30 training images are too few to calibrate with: more than 32 are needed. Name more" in few_images
    (few / "ant").rename(few / "dog")
    others = told(run, "--data", few)
    assert (
        f"{few} has other classes than the student: it has dog and lacks ant. Name" in others
        and "with `--data`" in others
    )
    assert "train.epochs" in told(run, "--qat", "--epochs", 0)
    longer = told(run, "--qat", "--epochs", 7)  # before ptq.onnx is written again, which `told` checks
    assert "holds a run of another recipe" in longer and "another folder with `--out`" in longer
    assert "optim.lrr" in told(run, "--qat", "optim.lrr=1")

    for name, changes in (("alone", {"losses": {"ce": {}}, "teacher": None}), ("bare", {"losses": {"fd": {}}})):
        (tmp_path / name).mkdir()
        recipe = changed(yaml.safe_load((run / "recipe.yaml").read_text()), losses=changes["losses"])
        recipe |= {key: value for key, value in changes.items() if key == "teacher"}
        (tmp_path / name / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        exported(tmp_path / name, "test_resnet", (48, 48), classes=0 if name == "bare" else 3)
    assert "was trained without a teacher; `--qat-labels` trains" in told(tmp_path / "alone", "--qat")
    assert "has no classifier" in told(tmp_path / "bare")

    gone = shutil.copytree(run, tmp_path / "gone", ignore=shutil.ignore_patterns("quantize"))
    (gone / "last.pt").unlink()
    monkeypatch.setattr(quantize, "calibrated", lambda *_: ({}, "minmax"))  # straight to the training
    assert "losses ce, kd, fd have parameters that were trained with it" in told(gone, "--qat")
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install 'scalekd[onnx]'" in told(run)


def test_stop_is_passed_on(root, monkeypatch):
    given = []
    monkeypatch.setattr(
        quantize, "execute", lambda *_, stop, **__: given.append(stop) or (_ for _ in ()).throw(Interrupted)
    )
    with StopRequest() as stop, pytest.raises(Interrupted):
        scalekd.quantize(root / "run", qat_labels=True, stop=stop, device="cpu", out=root / "other")
    assert given == [stop]
