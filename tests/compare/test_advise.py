"""Advice: its figures are those of docs/results, its choice follows its rules, and its commands are accepted."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from labelled_sets import write_sets
from scipy import stats

import scalekd
from scalekd.common.errors import UserError
from scalekd.compare import advise
from scalekd.compare.situation import FEATURES, FITTED, OWN, PRETRAINED, SCRATCH, Situation, kind_of, situation
from scalekd.config.losses import written_out
from scalekd.config.recipe import load_recipe
from scalekd.data.split import open_split
from scalekd.models.unfilled import unfilled

ROOT = Path(__file__).parents[2]
CELLS = advise.evidence()["gains"]
# ten people: their situation
PEOPLE = {
    "a hobbyist": Situation("CNN", SCRATCH, FITTED, 900, 0, 5, 300),
    "a shop with 20,000 photos": Situation("CNN", PRETRAINED, FITTED, 20_000, 0, 50, 15_000),
    "a lab with its own ViT": Situation("CNN", SCRATCH, OWN, 50_000, 0, 100, 39_000),
    "a phone camera": Situation("CNN", PRETRAINED, OWN, 5_000, 0, 20, 2_000),
    "a Mixer": Situation("Mixer", SCRATCH, OWN, 3_000, 0, 100, 1_000),
    "a ViT on a folder": Situation("ViT", SCRATCH, FITTED, 9_000, 0, 100, 5_000),
    "a ViT, its own teacher": Situation("ViT", SCRATCH, OWN, 8_000, 0, 100, 3_000),
    "ten labels": Situation("CNN", SCRATCH, FITTED, 10, 20_000, 10, 700),
    "few labels, many images": Situation("CNN", PRETRAINED, FITTED, 500, 40_000, 50, 4_000),
    "few labels, no other image": Situation("CNN", SCRATCH, FITTED, 100, 0, 10, 300),
}


def script() -> Any:
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "tools/evidence.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_evidence_follows_from_the_results():
    assert Path(advise.__file__).with_name("evidence.json").read_text() == script().text()


def test_every_gain_is_that_of_its_runs():
    checked = 0
    by_file = [(cell, file) for cell in CELLS for file in {row["file"] for row in cell["rows"].values()}]
    for cell, file in by_file:
        lines = (ROOT / file).with_name("results.jsonl").read_text().splitlines()
        of_student = [r for r in map(json.loads, lines) if r["student"] == cell["label"]]
        baseline = json.loads((ROOT / file).read_text())["baseline"]
        alone = {r["seed"]: r["top1"] for r in of_student if r["method"] == baseline}
        for name, row in [(name, row) for name, row in cell["rows"].items() if row["file"] == file]:
            gains = [r["top1"] - alone[r["seed"]] for r in of_student if r["method"] == name]
            half = stats.sem(gains) * stats.t.ppf(0.975, len(gains) - 1)
            assert row["gain"] == pytest.approx(np.mean(gains), abs=0.0051) and row["seeds"] == len(gains)
            assert row["ci95"] == pytest.approx(half, abs=0.0051)
            checked += 1
    assert checked > 50


@pytest.mark.parametrize("person", PEOPLE)
def test_a_person_gets_the_closest_measurement(person):
    found = PEOPLE[person]
    advice = advise._labelled(found)
    cell = json.loads((ROOT / advice["measured"]["file"]).read_text())
    assert advice["measured"]["kind"] == found.kind
    label = advice["measured"]["label"]
    rows = {name: row for name, row in cell["students"][label].items() if "gain" in row}
    (name,) = (n for n, row in rows.items() if math.isclose(advice["expected"]["gain"], row["gain"], abs_tol=0.006))
    assert name.endswith(", all images") or not found.unlabelled
    for reason in advice["reasons"]:
        assert "there" in reason or "interval" in reason
    config = load_recipe("own-data", advice["overrides"])
    if advice["overrides"]:  # the losses that were measured
        lines = (ROOT / advice["measured"]["file"]).with_name("results.jsonl").read_text().splitlines()
        runs = [r for r in map(json.loads, lines) if (r["student"], r["method"]) == (label, name)]
        for loss, options in runs[0]["recipe"]["losses"].items():
            ours = written_out(config.losses)[loss]
            assert {k: v for k, v in options.items() if k not in ("heads", "width")} == {
                k: v for k, v in ours.items() if k in options and k not in ("heads", "width")
            }
        assert (config.balance is not None) == (runs[0]["recipe"].get("balance") is not None)


def test_comparisons_of_one_situation_are_one():
    evidence = script()
    one = {"kind": "CNN", "steps": 300, "baseline": 50.0, "rows": {"KD": row(1) | {"file": "a"}}}
    more = one | {"baseline": 51.0, "rows": {"KD": row(2) | {"file": "b"}, "DIST": row(3) | {"file": "b"}}}
    (found,) = evidence._together([one, more])
    assert {name: r["file"] for name, r in found["rows"].items()} == {"KD": "a", "DIST": "b"} and found[
        "baseline"
    ] == 50
    assert len(evidence._together([one | {"steps": 600}, more])) == 2
    keys = [json.dumps({k: v for k, v in cell.items() if k not in ("rows", "baseline")}) for cell in CELLS]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("balanced", [True, False])
def test_balance_is_that_of_the_chosen_row(monkeypatch, balanced):
    losses = {"ce": {}, "dist": {"weight": 2.0}, "fd": {}}
    rows = {"own-data": row(1), "other": row(9)}
    rows = {name: r | {"losses": losses, "balanced": balanced, "file": "f"} for name, r in rows.items()}
    monkeypatch.setattr(advise, "nearest", lambda found: CELLS[0] | {"rows": rows})
    assert ("balance=null" in advise._labelled(PEOPLE["a Mixer"])["overrides"]) != balanced


def test_the_same_situation_is_at_distance_0():
    for cell in CELLS:
        same = Situation(
            cell["kind"], cell["start"], cell["teacher"], cell["labels"], 0, cell["classes"], cell["steps"]
        )
        assert advise.distance(cell, same) == 0
        assert advise.differences(cell, same) == []
        assert advise.distance(cell, replace(same, steps=4 * same.steps)) == pytest.approx(1)
        assert advise.distance(cell, replace(same, labels=same.labels * 16, classes=same.classes)) == pytest.approx(2)
        other = replace(same, kind="LSTM", steps=10 * same.steps)
        assert advise.differences(cell, other) == [
            f"a {cell['kind']} was trained, yours is a LSTM",
            f"{cell['steps']:,} steps, yours are {other.steps:,}",
        ]


def row(gain: float, ci95: float = 1.0) -> dict[str, float]:
    return {"gain": gain, "ci95": ci95, "seeds": 3}


@pytest.mark.parametrize(
    "rows, chosen, reason",
    [
        ({"KD": row(2), "own-data": row(3)}, "own-data", "largest gain there, +3.0 ± 1.0"),
        ({"KD": row(3), "own-data": row(2.1)}, "own-data", "within its interval: +2.1"),
        ({"KD": row(3), "own-data": row(1.9)}, "KD", "below its interval: +1.9"),
        ({"KD": row(3)}, "KD", "were not measured there"),
        ({"KD": row(-3), "own-data": row(0.5)}, "own-data", "not shown that a teacher helps"),
        ({"OFD": row(9, 8), "KD": row(1), "own-data": row(2)}, "own-data", "within its interval: +2.0"),
    ],
)
def test_the_default_is_chosen_within_the_interval_of_the_best(rows, chosen, reason):
    found, reasons = advise.choose(rows)
    assert found == chosen
    assert any(reason in text for text in reasons), reasons


def test_rows_are_those_of_the_images_that_a_person_has():
    cell = {"rows": {"KD, all images": row(3), "KD, labels only": row(2)}}
    some = PEOPLE["a hobbyist"]
    assert advise.rows_for(cell, some) == {"KD": row(2)}
    assert advise.rows_for(cell, replace(some, unlabelled=5)) == {"KD": row(3)}
    assert advise.rows_for({"rows": {"KD": row(3)}}, some) == {"KD": row(3)}
    assert advise.rows_for({"rows": {"KD": row(3)}}, replace(some, unlabelled=5)) == {}


@pytest.mark.parametrize(
    "name, kind",
    {
        "resnet18": "CNN",
        "convnext_tiny": "CNN",
        "mobilenetv4_conv_small": "CNN",
        "efficientnet_lite0": "CNN",
        "mixer_s16_224": "Mixer",
        "resmlp_12_224": "Mixer",
        "vit_tiny_patch16_224": "ViT",
        "eva02_tiny_patch14_224": "ViT",
        "swin_tiny_patch4_window7_224": "ViT",
        "deit_tiny_patch16_224": "ViT",
    }.items(),
)
def test_kinds_of_students(name, kind):
    with unfilled():
        assert kind_of(timm.create_model(name)) == kind


def read(config):
    return situation(config, open_split(config.data))


def test_a_situation_is_read_from_the_recipe_and_its_data(tiny_recipe, recipe_file):
    found = read(load_recipe(str(recipe_file)))
    assert (found.labels, found.unlabelled, found.classes, found.start) == (24, 0, 3, SCRATCH)
    assert found.steps == tiny_recipe["train"]["epochs"] * (24 // tiny_recipe["train"]["batch_size"])
    weights = load_recipe(str(recipe_file), ["student.weights=pretrained"])
    assert read(weights).start == PRETRAINED
    without = load_recipe(str(recipe_file), ["teacher=null", "losses={ce: {}}"])
    assert read(without).teacher == FEATURES


def test_a_teacher_that_was_trained_on_the_classes_is_seen(tmp_path, recipe_file):
    (tmp_path / "run").mkdir()
    weights = f"teacher.weights={tmp_path}/run/student.safetensors"
    fit = load_recipe(str(recipe_file), [weights, "teacher.head=fit"])
    assert read(fit).teacher == FITTED
    classes = sorted(p.name for p in (tmp_path / "images/train").iterdir())
    (tmp_path / "run/student.json").write_text(json.dumps({"classes": classes}))
    assert read(fit).teacher == OWN
    (tmp_path / "run/student.json").write_text(json.dumps({"classes": classes[::-1]}))
    assert read(fit).teacher == FITTED


OPTIONS = ["data.image_size=64", "train.batch_size=4"]
TINY = ["--teacher", "test_vit", "--student", "test_resnet", *OPTIONS]


def test_the_commands_that_it_names_are_accepted(cli, image_folder):
    result = cli("advise", "--data", image_folder, *TINY, "--steps", 24)
    assert (result.code, result.err) == (0, "")
    lines = [line.strip() for line in result.out.splitlines()]
    for start in ("scalekd train", "hours: scalekd plan", "scalekd compare"):
        (line,) = (line for line in lines if line.startswith(start))
        words = shlex.split(line.removeprefix("hours: "))[1:]
        assert "train.epochs=4" in words  # 24 images in batches of 4: 6 steps an epoch
        # there are no weights to fit a classifier on
        dry = [] if words[0] == "plan" else ["--dry-run", "teacher.weights=random", "teacher.head=null"]
        assert cli(*words, *dry).code in (0, 1), words


def test_python_gives_the_command_and_the_figures(image_folder):
    found = scalekd.advise(data=image_folder, teacher="test_vit", student="test_resnet", overrides=OPTIONS)
    assert found.command == shlex.join(
        ["scalekd", "train", "own-data", "--data", str(image_folder), *TINY, *found.overrides]
    )
    assert found.details["situation"]["steps"] == 100 * (24 // 4)
    cost = found.details["cost"]
    assert cost["times"] == 1 + cost["gmacs"]["teacher"] / cost["gmacs"]["student"]


def test_advice_on_sets_of_labels_says_that_nothing_was_measured(cli, tmp_path):
    write_sets(tmp_path / "sets", 24)
    table = tmp_path / "sets" / "labels.csv:separator=pipe"
    result = cli("advise", "--data", table, *TINY, "--steps", 20)
    assert (result.code, result.err) == (0, "")
    assert "no comparison on images with several labels was measured" in result.out
    assert "unknown: no comparison measured this" in result.out and "Measured\n" not in result.out
    assert "3 classes, several on an image" in result.out and "the features of a teacher" in result.out
    lines = [line.strip() for line in result.out.splitlines()]
    for start in ("scalekd train own-labels", "hours: scalekd plan own-labels", "scalekd compare own-labels-ladder"):
        (line,) = (line for line in lines if line.startswith(start))
        words = shlex.split(line.removeprefix("hours: "))[1:]
        assert "train.epochs=4" in words  # 20 images, 4 held out, in batches of 4: 5 steps an epoch
        dry = [] if words[0] == "plan" else ["--dry-run", "teacher.weights=random", "teacher.head=null"]
        assert cli(*words, *dry).code in (0, 1), words
    found = scalekd.advise(data=str(table), teacher="test_vit", student="test_resnet", overrides=OPTIONS)
    assert (found.recipe, found.expected, found.details["measured"]) == ("own-labels", None, {})


def test_advice_without_labels(cli, image_folder):
    result = cli("advise", "--unlabelled", image_folder / "train", "--val", image_folder / "val", *TINY, "--json")
    assert result.code == 0
    found = json.loads(result.out)
    assert (found["recipe"], found["expected"]) == ("own-images", None)
    measured = json.loads((ROOT / found["measured"]["file"]).read_text())["models"].values()
    means = {shots: np.mean([m["shots"][shots]["linear"]["mean"] for m in measured]) for shots in ("1", "10", "100")}
    assert found["measured"]["top1"] == pytest.approx(means, abs=0.006)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ([], "`--data`: name your images"),
        (["--data", "nowhere"], "no folder nowhere"),
        (["--data", "images", "--steps", "0"], "must be 1 or more"),
        (["--data", "images", "--teacher", "vit_tinny", "--student", "resnet19"], "2 problems"),
        (["--data", "images", "teacher=null", "losses={ce: {}}"], "the teacher is off"),
    ],
)
def test_bad_input(cli, image_folder, monkeypatch, arguments, text):
    monkeypatch.chdir(image_folder.parent)
    result = cli("advise", *arguments)
    assert result.code == 2
    assert text in result.err


def test_an_unreadable_folder_is_an_error_in_python():
    with pytest.raises(UserError, match="name your images"):
        scalekd.advise()
