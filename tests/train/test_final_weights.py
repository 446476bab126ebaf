"""A run exports its last weights, or its best ones with `train.export: best`, and says which."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from whole_runs import CPU, changed

from scalekd.config.recipe import check_config
from scalekd.distill.run import DistillationRun
from scalekd.runs.distillation import execute
from scalekd.train import checkpoint
from scalekd.train.log import read_log

TOP1 = [40.0, 60.0, 50.0, 50.0]  # of the validations; the report looks at the student once more


@pytest.fixture
def trained(light_recipe, tmp_path, monkeypatch):
    """Trains with `train.export` and returns the folder, the summary and the screen."""

    def run(export: str) -> tuple[Path, dict[str, Any], str]:
        scores = iter(TOP1)
        monkeypatch.setattr(
            DistillationRun, "validate", lambda *_: {"top1": next(scores), "top5": 90.0, "loss": 1.0, "images": 12}
        )
        recipe = changed(light_recipe, train={"epochs": 3, "export": export, "save_minutes": 100})
        screen, folder = Console(file=io.StringIO(), width=200), tmp_path / f"run-{export}"
        summary = execute(check_config(recipe, "test"), folder, CPU, screen, check=False, look=False)
        return folder, summary, screen.file.getvalue()

    return run


def test_the_last_weights(trained):
    folder, summary, screen = trained("last")
    steps = [e["step"] for e in read_log(folder) if e["event"] == "validation"]
    assert (summary["top1"], summary["exported_step"], summary["best_step"]) == (50.0, steps[2], steps[1])
    assert f"exported: the last weights, after step {steps[2]}" in screen and "60.00 %" in screen
    last = checkpoint.load(folder / "last.pt")["deployed"]
    assert all(torch.equal(last[name], value) for name, value in load_file(folder / "student.safetensors").items())


def test_the_best_weights(trained):
    folder, summary, screen = trained("best")
    assert (summary["top1"], summary["last_top1"], summary["exported"]) == (60.0, 50.0, "best")
    assert "exported: the best weights" in screen
    student, best = load_file(folder / "student.safetensors"), checkpoint.load(folder / "best.pt")
    assert all(torch.equal(best["student"][name], value) for name, value in student.items())
    last = checkpoint.load(folder / "last.pt")["deployed"]
    assert any(not torch.equal(last[name], value) for name, value in student.items())
    card = json.loads((folder / "student.json").read_text())
    assert (card["top1"], card["exported"], card["exported_step"]) == (60.0, "best", best["step"])
    assert f"Exported: the best weights, after step {best['step']}." in (folder / "report.html").read_text()
