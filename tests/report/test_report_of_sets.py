"""What a report says of images with sets of labels, and how it goes through any images: against independent counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_sets import write_sets
from whole_runs import CPU, TINY, changed

from scalekd.common.errors import UserError
from scalekd.config.recipe import check_config
from scalekd.distill.build import build
from scalekd.distill.run import DistillationRun
from scalekd.report import evaluate as looking
from scalekd.report.evaluate import STUDENT, TEACHER, look
from scalekd.report.label_sets import look_at_sets


def run_on(folder: Path, table: str, **changes: Any) -> DistillationRun:
    data = {key: str(folder / key / table) for key in ("train", "val")}
    losses = {"bce": {}, "kd": {"probabilities": "sigmoid"}}
    return build(check_config(changed(TINY, **{"data": data, "losses": losses} | changes), "test"), CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    write_sets(root / "train", 32)
    write_sets(root / "val", 18, seed=1)
    return root


def precision_of(scores: np.ndarray, truth: np.ndarray) -> float:
    """The mean over the positives of the share of positives among the images that score at least as high."""
    return float(np.mean([truth[scores >= s].mean() for s in scores[truth]]))


def test_student_and_teachers_are_compared_on_the_same_images(folder):
    teachers = {
        "vit": {"model": "test_vit", "kwargs": {"depth": 4}, "weights": "random"},
        "cnn": {"model": "test_convnext", "weights": "random"},
    }
    run = run_on(folder, "labels.csv:separator=pipe", teachers=teachers, teacher=None)
    seen = look_at_sets(run, run.deployed, 0.4)
    d, (batch,) = run.distiller, run.eval_batches(18, 0)
    pixels, truth = batch.images / 255, batch.targets.bool().numpy()
    with torch.no_grad():
        student = run.deployed((pixels - d.student_mean) / d.student_std)
        taught = torch.stack([teacher(pixels).logits for teacher in d.teachers.values()]).mean(0)
    assert (seen.images, seen.of_images, seen.threshold, seen.notes) == (18, 18, 0.4, [])
    for label, logits in ((STUDENT, student.numpy()), (TEACHER, taught.numpy())):
        each = [precision_of(logits[:, c], truth[:, c]) for c in range(3)]
        assert seen.figures[label]["map"] == pytest.approx(100 * np.mean(each), abs=1e-3)
        key = "ap" if label == STUDENT else "teacher_ap"
        assert {row["class"]: row[key] for row in seen.classes} == pytest.approx(
            {name: 100 * value for name, value in zip(run.classes, each)}, abs=1e-3
        )


def test_it_stops_when_its_time_is_up_and_says_so(folder, monkeypatch):
    monkeypatch.setattr(looking, "BATCH", 8)
    run = run_on(folder, "labels.csv:separator=pipe")
    seen = look_at_sets(run, run.deployed, None, seconds=0)
    assert seen.images == 8 and seen.notes == ["Stopped after 0 s."]
    seen = look_at_sets(run, run.deployed, None, most=8, seconds=0)
    assert seen.images == 8 and seen.notes == []  # all that were asked for


def test_images_without_any_label_are_an_error_and_no_traceback(tmp_path):
    write_sets(tmp_path / "train", 32)
    write_sets(tmp_path / "val", 18, seed=1)
    table = tmp_path / "val" / "labels.csv"
    head, _, *rows = table.read_text().splitlines()
    table.write_text("\n".join([head, "0.png,", *rows]))
    run = run_on(tmp_path, "labels.csv:separator=pipe,empty=keep")
    with pytest.raises(UserError, match=r"none of the 1 validation images of the report has a label.*raise `images`"):
        look_at_sets(run, run.deployed, None, most=1)
    assert look_at_sets(run, run.deployed, None).images == 18


def test_unreadable_images_do_not_shift_the_pictures(image_folder, tiny_recipe, monkeypatch):
    """Batches of one image: one that cannot be read gives no batch at all."""
    monkeypatch.setattr(looking, "BATCH", 1)
    places: list[int] = []
    monkeypatch.setattr(looking, "wrong_examples", lambda images, found, seen: places.extend(found) or [])
    bad = sorted((image_folder / "val").rglob("*.png"))[5]
    bad.write_bytes(b"no image")
    run = build(check_config(changed(tiny_recipe, data={"on_bad_image": "skip", "max_bad": 0.5}), "test"), CPU)
    seen = look(run, run.deployed)
    images = looking.chosen_images(run, [looking.shown_student(run, run.deployed)], 2000)
    targets = [images.source.targets[images.indices[place]] for place in places]
    assert seen.images == 11 and targets == seen.columns[STUDENT]["target"].tolist()
    for file in (image_folder / "val").rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"can be read|cannot be read"):
        look(run, run.deployed)
