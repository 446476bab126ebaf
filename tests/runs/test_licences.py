"""The licences of pre-trained weights: on the screen before training, in the provenance, on the card, and further on."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from exported_students import exported
from rich.console import Console
from whole_runs import CPU, changed

from scalekd.checks.model import licence_check
from scalekd.checks.preflight import preflight
from scalekd.common.errors import UserError
from scalekd.config.recipe import check_config
from scalekd.distill.build import build
from scalekd.models.student_file import export_student
from scalekd.models.weights.folder import beside
from scalekd.report.card import licence_lines, without_folders
from scalekd.runs.distillation import facts
from scalekd.runs.students import student_card
from scalekd.train.run import provenance


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A folder in timm's format, whose weights are for non-commercial use."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    exported(folder, "test_resnet", (48, 48))
    for name in ("student.safetensors", "student.json"):
        (folder / name).unlink()
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["license"] = "CC-BY-NC-4.0"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_non_commercial_teacher_is_told_everywhere(light_recipe, teacher, tmp_path):
    recipe: dict[str, Any] = changed(light_recipe, losses={"ce": {}, "kd": {}})
    recipe["teacher"] = {"model": str(teacher)}
    run = build(check_config(recipe, "test"), CPU)
    loaded = run.loaded["teacher"]
    assert loaded.licence == "cc-by-nc-4.0" and run.loaded["student"].licence is None
    assert provenance(run)["weights"]["teacher"]["licence"] == "cc-by-nc-4.0"
    assert facts(run)["teacher"].endswith("licence cc-by-nc-4.0 (non-commercial)")
    assert "licence" not in facts(run)["student"]

    screen = io.StringIO()
    with contextlib.suppress(UserError):  # the weights are noise
        preflight(run, Console(file=screen, width=500))
    lines = screen.getvalue().splitlines()
    assert sum("licence cc-by-nc-4.0 (non-commercial)" in line for line in lines) == 1
    assert len([line for line in lines if line.split()[:3] == ["warn", "teacher", "licence"]]) == 1
    assert licence_check("student", run.loaded["student"]) == []

    card = student_card(run)
    assert "- weights of teacher: cc-by-nc-4.0 (non-commercial)\n- images: unknown" in licence_lines(
        {"teacher": loaded.licence}
    )
    # a student that was taught by it, as the teacher of another run
    export_student(run.deployed, tmp_path / "student.safetensors", card)
    described = beside(tmp_path / "student.safetensors")
    assert described is not None and described.licence == "unknown, made from cc-by-nc-4.0"


def test_a_card_names_no_folders():
    text = "/home/ada/my-photos/train, 24 images of 3 classes; validation on 12"
    assert without_folders(text) == "train, 24 images of 3 classes; validation on 12"
    for kept in ("fashion-mnist:train", "12 images/s, 3/4", "runs/photos", "https://host/a/b"):
        assert without_folders(kept) == kept
    assert without_folders("tar:/data/a.tar") == "tar:a.tar"
