"""Whole runs on images with sets of labels: from training and its resume to the figures, cards and predictions."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from labelled_sets import write_sets
from whole_runs import CPU, TINY, assert_same, changed, events, final_state, start

import scalekd
from scalekd.checks.statistical_tests import Sample
from scalekd.checks.teacher_of_sets import accuracy_on_sets
from scalekd.common.errors import UserError
from scalekd.config.recipe import check_config
from scalekd.data.options import Augment
from scalekd.data.transforms import make_mixup, mixed
from scalekd.distill.build import build
from scalekd.distill.label_sets import scores_of
from scalekd.distill.rebuild import load_trained
from scalekd.train import checkpoint

TABLE = "labels.csv:separator=pipe"


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    write_sets(root / "train", 32)
    write_sets(root / "val", 18, seed=1)
    return root


@pytest.fixture
def recipe(sets: Path) -> dict[str, Any]:
    """test_resnet <- test_vit with all that works on sets of labels."""
    data = {"train": str(sets / "train" / TABLE), "val": str(sets / "val" / TABLE)}
    losses = {"bce": {}, "kd": {"probabilities": "sigmoid", "temperature": 2.0}, "fd": {}}
    return changed(TINY, data=data, losses=losses)


def test_a_resumed_run_is_the_same_bit_for_bit(recipe, tmp_path):
    from whole_runs import Interrupted

    recipe = changed(
        recipe,
        data={"class_balance": 0.7},
        augment={"mixup": 0.2, "cutmix": 1.0, "erase": 0.5},
        train={"ema": 0.9, "accumulate": 2},
    )
    start(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        start(recipe, tmp_path / "stopped", stop_at=6)  # of 8, in the middle of the second epoch
    start(recipe, tmp_path / "stopped")
    assert_same(final_state(tmp_path / "stopped"), final_state(tmp_path / "whole"))


def test_from_training_to_predictions(recipe, sets, tmp_path, cli):
    recipe = changed(recipe, train={"epochs": 3, "export": "best"})
    recipe_file, run = tmp_path / "sets.yaml", tmp_path / "run"
    recipe_file.write_text(json.dumps(recipe))
    trained = cli("train", recipe_file, "--out", run)
    assert trained.code == 0, trained.err
    history = events(run, "validation")
    best = max(history, key=lambda event: (event["map"], -event["step"]))
    card, summary = (json.loads((run / name).read_text()) for name in ("student.json", "summary.json"))
    assert checkpoint.load(run / "best.pt")["step"] == best["step"] == summary["exported_step"]
    for key in ("map", "threshold"):
        assert card[key] == summary[key] == best[key]
    assert card["multi_label"] and json.loads((run / "config.json").read_text())["threshold"] == card["threshold"]
    assert f"mAP {best['map']:.2f} %" in trained.out

    measured = json.loads(cli("evaluate", run, "--data", sets / "val" / TABLE, "--json").out)
    assert {k: measured[k] for k in ("map", "f1_macro", "f1_micro", "loss")} == pytest.approx(
        {k: best[k] for k in ("map", "f1_macro", "f1_micro", "loss")}, abs=1e-4
    )
    assert measured["top1"] is None and len(measured["classes"]) == 3
    assert "precision %" in cli("evaluate", run, "--data", sets / "val" / TABLE).out
    refused = cli("evaluate", run, "--data", sets / "val" / "labels.csv")
    assert refused.code == 2 and "write separator=pipe" in refused.err

    _predictions_are_those_above_the_threshold(run, sets, card, cli, tmp_path)
    report, readme = (run / "report.html").read_text(), (run / "README.md").read_text()
    assert "Sets of labels" in report and "teacher&#x27;s AP" in report and f"at least {card['threshold']:g}" in report
    assert "may predict no class or several" in readme and f"p >= {card['threshold']}" in readme and "| cat |" in readme
    assert cli("export", run, "--checkpoint", "last").out.startswith(
        f"exported: the last weights, mAP {history[-1]['map']:.2f}"
    )


def _predictions_are_those_above_the_threshold(run, sets, card, cli, tmp_path):
    student = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    pixels = timm.data.create_transform(**timm.data.resolve_model_data_config(student))
    from PIL import Image

    out = tmp_path / "labels.csv"
    for options, least in (([], card["threshold"]), (["--threshold", 0.6], 0.6)):
        assert cli("predict", run, sets / "val", "--csv", out, *options).code == 0
        with open(out) as file:
            _, *rows = csv.reader(file)
        assert len(rows) == 18
        for row in rows[:6]:
            with torch.no_grad():
                shares = student(pixels(Image.open(row[0]))[None])[0].sigmoid().tolist()
            expected = {name for name, p in zip(card["classes"], shares) if p >= least}
            assert set(filter(None, row[1::2])) == expected
    assert cli("predict", run, sets / "val", "--threshold", 0.9999, "--sheet", tmp_path / "sheet.png").code == 0
    for wrong in (0, 1, 1.5):
        refused = cli("predict", run, sets / "val", "--threshold", wrong)
        assert refused.code == 2 and "must be above 0 and below 1" in refused.err


def test_validation_of_a_rebuilt_run_is_that_of_its_log(recipe, tmp_path):
    start(recipe, tmp_path)
    run = build(check_config(recipe, "test"), CPU)
    load_trained(run, checkpoint.load(tmp_path / "last.pt"), tmp_path / "last.pt")
    found = run.validate(run.eval_batches(5, 0))
    logged = events(tmp_path, "validation")[-1]
    assert found == pytest.approx({key: logged[key] for key in found}, rel=1e-5)
    d = run.distiller
    truth = scores_of(run.student, run.eval_batches(7, 0), d.student_mean, d.student_std, CPU).truth
    assert truth.sum(0).tolist() == [len([t for t in run.val_images.source.targets if c in t]) for c in range(3)]


@pytest.mark.parametrize(
    "losses, told",
    [
        ({"ce": {}, "kd": {}, "dkd": {}, "dist": {}}, ["losses.ce", "losses.kd", "losses.dkd", "losses.dist"]),
        ({"bkd": {}, "ofa": {}, "bce": {}}, ["losses.bkd", "losses.ofa"]),
        ({"fd": {}}, ["losses: none uses the student's logits"]),
    ],
)
def test_losses_for_one_class_are_refused_together_with_the_reason(recipe, losses, told):
    with pytest.raises(UserError) as caught:
        build(check_config(recipe | {"losses": losses}, "test"), CPU)
    lines = str(caught.value).splitlines()
    assert [line for line in lines if any(line.startswith(text) for text in told)] == lines and len(lines) == len(told)


def test_sets_are_refused_where_one_class_is_needed_and_the_reverse(recipe, sets, tiny_recipe, cli, tmp_path):
    with pytest.raises(UserError, match=r"losses.asl: it is for sets of labels"):
        build(check_config(tiny_recipe | {"losses": {"asl": {}}, "teacher": None}, "test"), CPU)
    with pytest.raises(UserError, match=r"augment.mixup and augment.cutmix mix them"):
        check_config(changed(recipe, losses={"asl": {}, "fd": {}}, augment={"mixup": 0.1}), "test")
    table = sets / "train" / TABLE
    wrong = (
        "compare",
        "own-ladder",
        "--data",
        table,
        "--student",
        "test_resnet",
        "--teacher",
        "test_vit",
        "--out",
        tmp_path / "c",
    )
    label_free = (
        "advise",
        "--unlabelled",
        sets / "val",
        "--val",
        table,
        "--student",
        "test_resnet",
        "--teacher",
        "test_vit",
    )
    for command in (wrong, label_free):
        refused = cli(*command)
        assert refused.code == 2 and "needs one class per image" in refused.err, refused


def test_mixed_images_have_mixed_sets():
    mixup = make_mixup(Augment(mixup=1.0), 3, multi_label=True)
    images, targets = torch.rand(4, 3, 8, 8), torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0]])
    before = images.clone()
    soft_images, soft = mixed(images, targets, mixup)
    share = ((soft_images - before.flip(0)) / (before - before.flip(0))).median().item()  # of each image itself
    torch.testing.assert_close(soft, share * targets + (1 - share) * targets.flip(0), rtol=0, atol=1e-5)
    assert 0 < share < 1


def test_a_teacher_at_chance_or_without_sigmoids_is_noticed():
    generator = torch.Generator().manual_seed(0)
    truth = (torch.rand(200, 4, generator=generator) < 0.2).float()
    noise = torch.randn(200, 4, generator=generator)
    sample = Sample(torch.empty(0), truth)
    good = accuracy_on_sets("a", 4 * truth - 2 + noise, sample, ["kd"])
    chance = accuracy_on_sets("a", noise, sample, ["kd"])
    shifted = accuracy_on_sets("a", 4 * truth + 10 + noise, sample, ["kd"])
    assert good.status == "ok" and chance.status == "warn" and "shuffled labels" in chance.fix
    assert shifted.status == "warn" and "kd would teach these probabilities" in shifted.fix
    assert accuracy_on_sets("a", 4 * truth + 10 + noise, sample, []).status == "ok"


def test_from_python(recipe, sets, tmp_path):
    result = scalekd.train(
        _saved(changed(recipe, losses={"asl": {}}, teacher=None, train={"epochs": 1}), tmp_path), out=tmp_path / "run"
    )
    found = scalekd.evaluate(tmp_path / "run", data=str(sets / "val" / TABLE))
    assert result.top1 is None and found.top1 is None and found.map == pytest.approx(result.metrics["map"], abs=1e-4)
    assert scalekd.predict(tmp_path / "run", sets / "val").threshold == found.threshold


def _saved(recipe: dict[str, Any], folder: Path) -> Path:
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


def test_sets_and_images_without_labels_share_a_batch(recipe, sets, tmp_path):
    recipe = changed(
        recipe,
        data={"unlabelled": str(sets / "train" / TABLE), "limit": 16, "class_balance": 1.0},
        augment={"mixup": 0.2},
        train={"epochs": 1},
    )
    run = start(recipe, tmp_path)
    batch = next(run.train_batches(run.train_sampler(), 0))
    assert batch.targets.shape == (4, 3) and len(batch.images) == 8
    images, targets = run.inputs(batch)
    assert len(images) == 8 and targets.shape == (4, 3) and run.distiller(images, targets)["total"].isfinite()
