"""The page and the model card of a detector's and a segmenter's run, against their logs and their exported models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_transfer_runs as small
import timm
import torch
import yaml
from damage import some_of
from pages import cells, well_formed
from PIL import Image
from structures import with_structure

from scalekd.common.errors import UserError
from scalekd.models.student_file import export_student
from scalekd.report import run as report_run
from scalekd.report.folder import read_run
from scalekd.report.transfer_sections import figure_sections
from scalekd.train.log import read_log
from scalekd.transfer.exported_model import load
from scalekd.transfer.tasks import TASKS

scenes = small.scenes
NONE = "\N{EN DASH}"


@pytest.fixture(scope="session")
def runs(scenes, tmp_path_factory) -> dict[str, Path]:
    """A finished run of each task; the detector's backbone is the student of a run that had a teacher."""
    root = tmp_path_factory.mktemp("reported")
    torch.manual_seed(0)
    student = timm.create_model("test_resnet", num_classes=2)
    state = student.state_dict()  # initial values are refused
    student.load_state_dict({k: with_structure(v) if v.is_floating_point() and v.ndim else v for k, v in state.items()})
    (root / "taught").mkdir()
    card = {"model": "test_resnet", "kwargs": {"num_classes": 2}, "classes": ["a", "b"], "image_size": [48, 48]}
    card |= {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "crop_pct": 1.0}
    card |= {"teacher": "test_vit", "losses": {"ce": {}, "kd": {"temperature": 2.0}}}
    export_student(student, root / "taught" / "student.safetensors", card)
    changes: dict[str, dict[str, Any]] = {
        "detection": {"backbone": {"model": str(root / "taught"), "weights": "pretrained"}, "train": {"epochs": 1}},
        "segmentation": {"train": {"iterations": 2, "eval_every": 2}},
    }
    for task, change in changes.items():
        small.trained(small.config_of(task, root, small.recipe(task, scenes, **change)), root / task)
    return {task: root / task for task in TASKS}


def copied(run: Path, to: Path, without: tuple[str, ...] = ()) -> Path:
    to.mkdir()
    for file in run.iterdir():
        if file.suffix != ".pt" and file.name not in without:
            (to / file.name).write_bytes(file.read_bytes())
    return to


def last_validation(run: Path) -> dict[str, Any]:
    return [e for e in read_log(run) if e["event"] == "validation"][-1]


def shown(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


@pytest.mark.parametrize("task", TASKS)
def test_nothing_is_said_of_what_is_not_there(runs, task):
    page = (runs[task] / "report.html").read_text()
    well_formed(page)
    for absent in ("without a teacher", "rackets", "Gains", "losses</th>", "teacher forward", "student, method", "±"):
        assert absent not in page
    assert cells(page)[0][2:] == ["time", "images/s", "seeds"] and "everything else: model, losses, optimiser" in page
    assert re.search(r">data [\d.]+%, rest [\d.]+%<", page)
    assert not re.search(r"<(script|link|iframe)|@import|url\((?!#)|http(?!-equiv)", page)


def test_whose_student_the_backbone_is(cli, runs, tmp_path):
    page = (runs["segmentation"] / "report.html").read_text()
    assert "<p>UPerNet on test_resnet, weights: random.</p>" in page
    weights = runs["detection"].parent / "taught" / "student.safetensors"
    told = f"Mask R-CNN on test_resnet, weights: {weights}, the student of test_vit, with ce, kd (temperature 2.0)."
    assert f"<p>{told}</p>" in (runs["detection"] / "report.html").read_text()
    # another student has taken its place since: the page keeps what was so
    run = copied(runs["detection"], tmp_path / "run")
    made = json.loads((run / "provenance.json").read_text())
    made["weights"]["backbone"]["sha256"] = "0" * 64
    (run / "provenance.json").write_text(json.dumps(made))
    assert cli("report", run).code == 0 and told in (run / "report.html").read_text()
    (run / "report.json").unlink()
    assert cli("report", run).code == 0 and "the student of" not in (run / "report.html").read_text()


def test_average_precisions(runs):
    last, rows = last_validation(runs["detection"]), cells((runs["detection"] / "report.html").read_text())
    at = rows.index(["%", "AP", "AP50", "AP75", "S", "M", "L"])
    keys = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    for kind, row in zip(("box", "mask"), rows[at + 1 :]):
        assert row == [kind, *(shown(last[f"{kind}_{key}"]) for key in keys)]
    assert NONE in rows[at + 1]  # there are no large objects in images of 48 pixels
    classes = {name: ap for name, ap in last["classes"].items() if ap is not None}
    at = rows.index(["class", "mask AP (%)"])
    assert dict(rows[at + 1 : at + 1 + len(classes)]) == {name: shown(ap) for name, ap in classes.items()}
    assert json.loads((runs["detection"] / "report.json").read_text())["validation"] == last


def test_shares_of_pixels(runs):
    last, rows = last_validation(runs["segmentation"]), cells((runs["segmentation"] / "report.html").read_text())
    for name, key in (("mIoU", "miou"), ("pixel accuracy", "pixel_accuracy"), ("mean accuracy", "mean_accuracy")):
        assert [name, shown(last[key])] in rows
    counted = [c for c in last["per_class"] if c["iou"] is not None]
    at = rows.index(["class", "IoU (%)", "accuracy (%)", "pixels"])
    expected = [[c["class"], shown(c["iou"]), shown(c["accuracy"]), f"{c['pixels']:,}"] for c in counted]
    found = rows[at + 1 : at + 1 + len(counted)]
    assert sorted(found) == sorted(expected) and [float(r[1]) for r in found] == sorted(float(r[1]) for r in expected)
    assert np.mean([c["iou"] for c in counted]) == pytest.approx(last["miou"])


def test_of_many_classes_the_worst_and_the_best(runs, tmp_path):
    run = copied(runs["detection"], tmp_path / "run")
    found = read_run(run)
    classes = {f"c{i}": float(i) for i in range(90)} | {"<b>none": None}
    found.events = [last_validation(run) | {"classes": classes}]
    page = figure_sections(found)[1]
    kept = [row[0] for row in cells(page)[1:]]
    assert kept == [f"c{i}" for i in [*range(20), *range(70, 90)]]
    assert (
        "the 50 between them are not shown" in page and "because the images have no such object: &lt;b&gt;none." in page
    )


@pytest.mark.parametrize("task", TASKS)
def test_a_run_that_is_not_finished(cli, runs, tmp_path, task):
    run = copied(runs[task], tmp_path / "run", (TASKS[task].weights, "summary.json", "report.json", "README.md"))
    assert cli("report", run).code == 0
    page = (run / "report.html").read_text()
    well_formed(page)
    assert (
        "Not finished: step" in page and f"{TASKS[task].weights} is written at the end" in page and "lr 0.001" in page
    )
    assert not (run / "README.md").exists()


def test_options_that_such_a_page_cannot_use_are_rejected(cli, runs):
    run = runs["detection"]
    for flags in (["--data", run], ["--baseline", run], ["--images", "5", "--device", "cpu"]):
        result = cli("report", run, *flags)
        names = " and ".join(f"`{flag}`" for flag in flags if str(flag).startswith("--"))
        assert result.code == 2 and f"leave out {names}" in result.err


@pytest.mark.parametrize("task", TASKS)
def test_the_card_loads_the_model(runs, tmp_path, monkeypatch, task):
    run = copied(runs[task], tmp_path / "run")
    _, front, text = (run / "README.md").read_text().split("---\n", 2)
    told, last = yaml.safe_load(front), last_validation(run)
    metrics = {m["type"]: m["value"] for m in told["model-index"][0]["results"][0]["metrics"]}
    assert metrics == {key: round(last[key], 2) for key in metrics} and len(metrics) == 2
    assert "- data: " in text and "- backbone: test_resnet, weights: " in text
    assert ("the student of test" in text) == (task == "detection")
    assert f"scalekd {'detect' if task == 'detection' else 'segment'} predict . photos --out" in text
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(run / "image.png")
    monkeypatch.chdir(run)
    names: dict[str, Any] = {}
    exec(re.search("```python\n(.*?)```", text, re.DOTALL)[1], names)
    model, card = load(run, task)
    x = torch.from_numpy(pixels).permute(2, 0, 1)
    theirs = names["model"].state_dict()
    assert all(torch.equal(theirs[key], value) for key, value in model.state_dict().items())
    if task == "detection":
        assert torch.equal(names["pixels"], x) and set(names["found"]) == {"boxes", "labels", "scores", "masks"}
        assert len(names["names"]) == (names["found"]["scores"] > 0.5).sum()
    else:  # 32 pixels are what it was validated at, so nothing is resized
        mean, std = (torch.tensor(card[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        with torch.no_grad():
            expected = model((x[None] / 255 - mean) / std).argmax(1)[0]
        assert np.array_equal(names["classes"], expected.numpy())


def test_a_card_that_a_person_wrote_is_kept(cli, runs, tmp_path):
    run = copied(runs["segmentation"], tmp_path / "run")
    (run / "README.md").write_text("mine")
    assert cli("report", run).code == 0 and (run / "README.md").read_text() == "mine"


@pytest.mark.parametrize("task", TASKS)
def test_a_damaged_file_never_ends_in_a_traceback(runs, tmp_path, task):
    run = copied(runs[task], tmp_path / "run")
    weights = TASKS[task].weights
    read = ["recipe.yaml", "log.jsonl", "summary.json", "provenance.json", "report.json", "README.md"]
    for files, number, use in (
        ([*read, Path(weights).with_suffix(".json").name], 2, lambda: report_run.report(run)),
        ([weights, Path(weights).with_suffix(".json").name], 2, lambda: load(run, task)),
    ):
        for name, content in some_of(run, files, number):
            before = (run / name).read_bytes()
            (run / name).write_bytes(content)
            try:
                use()
            except UserError as error:
                assert len(str(error).splitlines()) <= 40
            except Exception as error:
                raise AssertionError(f"{name}: {content[:3000]!r}") from error
            (run / name).write_bytes(before)


def test_a_segmenter_s_validation_with_empty_values(runs, tmp_path):
    run = copied(runs["segmentation"], tmp_path / "run")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in lines:
        if line["event"] == "validation":
            line |= {"pixels": None, "images": None, "per_class": [{"class": "a", "iou": 3.0}]}
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report_run.report(run)
