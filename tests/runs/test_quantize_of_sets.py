"""`scalekd quantize` on images with sets of labels: mAP, equal labels at the threshold, and int8 training with the teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_sets import slow_map, write_sets
from quick_quantising import make_quick
from rich.console import Console
from whole_runs import CPU, TINY, changed

import scalekd
from scalekd.cli.quantize import table
from scalekd.config.recipe import check_config
from scalekd.data.sources.open import open_source
from scalekd.distill.rebuild import read_recipe
from scalekd.models.open_student import open_student
from scalekd.report.quantized_section import quantized_block, quantized_section
from scalekd.runs.distillation import execute
from scalekd.runs.int8 import threshold_of
from scalekd.runs.quantized_recipe import quantized_recipe
from scalekd.runs.students import validation_transform

TABLE = "labels.csv:separator=pipe"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """train/ and val/ with sets of labels, and run/ with a student that learnt a teacher's sigmoids."""
    root = tmp_path_factory.mktemp("quantize-sets")
    write_sets(root / "train", 60)
    write_sets(root / "val", 24, seed=1)
    losses = {"bce": {}, "kd": {"probabilities": "sigmoid"}}
    data = {"train": str(root / "train" / TABLE), "val": str(root / "val" / TABLE)}
    recipe = changed(TINY, data=data, losses=losses, optim={"lr": 3e-3}, train={"epochs": 4})
    execute(check_config(recipe, "test"), root / "run", CPU, Console(quiet=True), check=False, look=False)
    return root


@pytest.fixture(scope="module")
def found(root) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        return scalekd.quantize(root / "run", qat=True, epochs=1, images=32, device="cpu")


def answers(path: Path, table: Path) -> tuple[np.ndarray, np.ndarray]:
    """The logits of a student for all images of a table, and the truth, (N, C) each."""
    student, card = open_student(path, CPU)
    source, transform = open_source(str(table / TABLE), "data"), validation_transform(card)
    images = torch.stack([torch.as_tensor(np.asarray(transform(source[i][0]))) for i in range(len(source))]) / 255
    mean, std = (torch.tensor(card[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        logits = student((images - mean) / std).numpy()
    return logits, np.array([[c in target for c in range(3)] for target in source.targets])


def test_every_file_has_its_map_and_the_share_of_equal_labels(root, found):
    assert list(found.rows) == ["float32", "ptq", "qat"] and found.way == "qat"
    card = json.loads((root / "run" / "student.json").read_text())
    first, truth = answers(root / "run", root / "val")
    z = np.log(card["threshold"] / (1 - card["threshold"]))
    assert found.rows["float32"]["map"] == pytest.approx(slow_map(first, truth), abs=1e-4)
    for way, file in (("ptq", "ptq.onnx"), ("qat", "qat/student.int8.onnx")):
        path, row = root / "run" / "quantize" / file, found.rows[way]
        logits, _ = answers(path, root / "val")
        assert row["map"] == pytest.approx(slow_map(logits, truth), abs=1e-4) and "top1" not in row
        assert row["change"] == pytest.approx(row["map"] - found.rows["float32"]["map"]) and row["change_interval"] >= 0
        assert row["agreement"] == pytest.approx(100 * ((logits >= z) == (first >= z)).mean())
    trained = found.rows["qat"]["trained"]
    assert trained["images"] == 24 and trained["same_labels"] > 97 and "same_class" not in trained


def test_the_calibration_has_the_best_map(found):
    tried = found.details["calibration"]["tried"]
    assert tried.keys() == {"float32", "minmax", "entropy", "percentile"}
    best = max(row["map"] for name, row in tried.items() if name != "float32")
    assert tried[found.details["calibration"]["method"]]["map"] == best


def test_the_files_in_use_and_on_pages(root, found, cli):
    lines = table(found)
    assert "mAP %" in lines[0] and "same labels" in lines[0] and lines[-3].startswith("mAP on the validation images")
    assert f"{found.rows['qat']['map']:.2f}" in lines[3] and "top-1" not in "\n".join(lines)
    assert "same labels %" in quantized_section(root / "run") and "mAP %" in quantized_block(root / "run")
    result = cli("evaluate", found.file, "--data", root / "val" / TABLE, "--device", "cpu")
    assert f"mAP {found.rows['qat']['map']:.2f} %" in result.out
    card = json.loads((root / "run" / "quantize" / "qat" / "student.json").read_text())
    assert "map" not in card and 0 < card["threshold"] < 1  # its weights before rounding have another mAP
    assert scalekd.predict(found.file, root / "val", device="cpu").threshold == card["threshold"]


def test_training_with_labels_needs_a_loss_that_suits(root):
    config = read_recipe(root / "run")
    given = (root / "run", "qat-labels", "minmax", 32, 1, [])
    assert quantized_recipe(config, *given).losses.keys() == {"bce"}
    taught = config.model_copy(update={"losses": {"kd": {"probabilities": "sigmoid"}}})
    assert quantized_recipe(taught, *given).losses.keys() == {"bce"}


def test_data_of_another_kind_are_refused(root, image_folder, cli):
    refused = cli("quantize", root / "run", "--data", image_folder)
    assert refused.code == 2 and "has one class per image, and the student was trained on sets of labels" in refused.err
    with pytest.raises(scalekd.UserError, match="has no `threshold`, because its run has not ended"):
        threshold_of({"multi_label": True})


def test_another_format_is_compared_by_map_and_equal_labels(root, cli):
    shown = cli("export", root / "run", "--format", "fp16")
    assert shown.code == 0 and "top-1" not in shown.out, shown.err
    made = json.loads((root / "run" / "formats.json").read_text())["formats"]["fp16"]
    first, truth = answers(root / "run", root / "val")
    assert made["student_map"] == pytest.approx(slow_map(first, truth), abs=1e-4) and "top1" not in made
    assert made["agreement"] > 97 and f"mAP {made['map']:.2f} % (student {made['student_map']:.2f} %)" in shown.out
