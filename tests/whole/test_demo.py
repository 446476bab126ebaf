"""The whole demo on a small part of its budget, and its committed results."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import timm
import torch

from scalekd.config.recipe import load_recipe
from scalekd.data.batches import eval_batches
from scalekd.demo import demo as module
from scalekd.distill.build import build
from scalekd.distill.evaluate import evaluate
from scalekd.models.create import resolve
from scalekd.models.weights.match import sha256_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "demo-5-seeds"


@pytest.mark.slow
def test_demo_from_preflight_to_report(tmp_path, monkeypatch, capsys):
    quick = ["data.limit=100", "train.epochs=2", "train.eval_every=1", "schedule.warmup_epochs=0"]
    quick += ["data.val=null", "data.val_fraction=0.01"]
    monkeypatch.setattr(module, "METHODS", {name: [*o, *quick] for name, o in module.METHODS.items()})
    whole = module.teacher_accuracy  # of 10,000 images; two batches here, 2,000 images in the next test
    monkeypatch.setattr(module, "teacher_accuracy", lambda d, batches, device: whole(d, islice(batches, 2), device))
    summary = module.demo(tmp_path, [0, 1])

    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["top1"] == summary["top1"] and list(written["top1"]) == ["teacher", "baseline", "kd", "scalekd"]
    assert written["seeds"] == [0, 1] and written["seconds"] > 0
    assert all(len(values) == 2 for values in written["top1_by_seed"].values())
    assert written["largest_difference_of_logits"]["timm"] == 0
    assert written["largest_difference_of_logits"]["onnxruntime"] < 1e-4
    assert (tmp_path / "scalekd-seed0" / "student.onnx").is_file()
    assert "ScaleKD" in (tmp_path / "report.html").read_text()
    assert "Pre-flight" in capsys.readouterr().out

    monkeypatch.setattr(module, "checked", lambda recipe, device, console: build(recipe, device))
    monkeypatch.setattr(module, "export_onnx", lambda *_: 0.0)  # both were tried above
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/last.pt")}
    assert module.demo(tmp_path, [0, 1])["top1_by_seed"] == summary["top1_by_seed"]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/last.pt")} == before, (
        "finished runs are read, not repeated"
    )


def test_the_teacher_is_as_good_as_its_card_says():
    """On every fifth test image, its top-1 is within three standard errors of the card's."""
    card = json.loads(resolve("package:demo/teacher.json").read_text())
    assert card["top1"] >= 92
    assert card["sha256"] == sha256_of(resolve("package:demo/teacher.safetensors"))
    run = build(load_recipe("demo"), torch.device("cpu"))
    assert run.distiller.teacher_view is not None
    run.val_images.indices = list(run.val_images.indices)[::5]
    result = evaluate(
        run.distiller.teacher_view.model,
        eval_batches(run.val_images, 256, 0, False),
        run.distiller.teacher_mean,
        run.distiller.teacher_std,
        torch.device("cpu"),
    )
    assert abs(result["top1"] - card["top1"]) < 3 * 100 * (0.92 * 0.08 / 2000) ** 0.5


def test_the_teacher_is_what_its_recipe_builds():
    card = json.loads(resolve("package:demo/teacher.json").read_text())
    recipe, demo = load_recipe("demo-teacher-finish"), load_recipe("demo")
    assert demo.teacher is not None and card["model"] == recipe.student.model == demo.teacher.model
    model = timm.create_model(
        card["model"], checkpoint_path=str(resolve("package:demo/teacher.safetensors")), **card["kwargs"]
    )
    assert sum(p.numel() for p in model.parameters()) > 500_000


def test_all_methods_get_the_same_budget():
    configs = [load_recipe("demo", overrides) for overrides in module.METHODS.values()]
    for field in ("data", "augment", "student", "train", "optim", "schedule", "seed"):
        assert len({repr(getattr(c, field)) for c in configs}) == 1, field
    assert [list(c.losses) for c in configs] == [["ce"], ["ce", "kd"], ["ce", "kd", "scalekd"]]


def test_committed_results_are_consistent_and_shown_in_the_readme():
    summary = json.loads((RESULTS / "summary.json").read_text())
    assert len(summary["seeds"]) >= 5
    table = module.markdown(summary)
    assert table == (RESULTS / "summary.md").read_text()
    assert table in (ROOT / "README.md").read_text()
