"""The second laboratory: its images follow from its files, its parts share no icon set, and its ladders are as written."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from scalekd.compare.ladder import jobs, load_ladder
from scalekd.config.recipe import load_recipe
from scalekd.data.sources.open import open_source

LAB = Path(__file__).parents[2] / "lab" / "colour"
SHA256 = re.compile(r"[0-9a-f]{64}")


def loaded(name: str) -> ModuleType:
    """A script of lab/colour under a name of its own: lab/ has a data.py too."""
    spec = importlib.util.spec_from_file_location(f"colour_{name}", LAB / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.append(str(LAB))
import icons  # noqa: E402

budgets, data, jpegs = loaded("budgets"), loaded("data"), loaded("jpegs")
shares, student = loaded("shares"), loaded("student")


@pytest.fixture
def few(monkeypatch):
    """Two images of each of two classes, from two icons that stand in for two sets."""
    monkeypatch.setattr(data, "COUNTS", {"train": 2, "search": 2, "test": 2})
    red, ring = Image.new("RGBA", (96, 96), (200, 20, 20, 255)), np.zeros((96, 96, 4), np.uint8)
    ring[20:76, 20:76] = (20, 90, 200, 255)
    return {"apple": [red, red.rotate(45)], "bell": [Image.fromarray(ring), Image.fromarray(ring // 2)]}


def test_equal_icons_give_equal_pixels(few, tmp_path):
    sums = [data.write(tmp_path / f"{k}.tar", data.images("train", few)) for k in range(2)]
    assert sums[0] == sums[1]
    assert (tmp_path / "0.tar").read_bytes() == (tmp_path / "1.tar").read_bytes()
    assert data.write(tmp_path / "other.tar", data.images("test", few)) != sums[0]


def test_an_archive_opens_as_a_source(few, tmp_path):
    data.write(tmp_path / "images.tar", data.images("train", few))
    source = open_source(f"tar:{tmp_path / 'images.tar'}", "data.train")
    assert source.classes == ["apple", "bell"]
    assert list(source.targets) == [0, 0, 1, 1]
    assert source[0][0].size == (64, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["images.tar"]


def test_an_image_does_not_depend_on_the_others(few):
    whole = dict(data.images("train", few))
    data.COUNTS["train"] = 1
    assert dict(data.images("train", few))["bell/000.png"].tobytes() == whole["bell/000.png"].tobytes()


def test_the_icon_shows():
    white = Image.new("RGBA", (96, 96), "white")
    made = np.stack([np.asarray(data.scene(white, np.random.default_rng(k))) for k in range(20)])
    assert made[:, 24:40, 24:40].mean() > made[:, ::63, ::63].mean() + 30


def test_the_parts_share_no_set_and_no_artists():
    sets = icons.listed()
    artists = {part: {s.artists for s in sets.values() if s.part == part} for part in data.COUNTS}
    assert sum(len(names) for names in artists.values()) == len(set.union(*artists.values()))
    assert all(artists.values())
    assert all(s.part in data.COUNTS for s in sets.values())
    assert len(sets) >= 6


def test_the_checksums_are_well_formed():
    assert data.expected_sums().keys() == data.COUNTS.keys()
    sums = [*data.expected_sums().values(), *(s.sha256 for s in icons.listed().values()), student.SHA256]
    assert all(SHA256.fullmatch(checksum) for checksum in sums)
    assert len(set(sums)) == len(sums)


def test_there_are_a_hundred_classes_or_more():
    names = icons.class_names()
    assert len(set(names)) == len(names) >= 100
    assert len(names) * data.COUNTS["train"] == 32 * budgets.STEPS_PER_EPOCH


def test_another_package_is_refused(tmp_path):
    name, about = next(iter(icons.listed().items()))
    with tarfile.open(tmp_path / f"iconify-json-{name}-{about.version}.tgz", "w:gz"):
        pass
    with pytest.raises(SystemExit, match="sha256 differs"):
        icons.fetch(name, tmp_path)


@pytest.mark.parametrize("name", budgets.LADDERS)
def test_the_ladders_follow_from_the_script(name):
    file = LAB / f"{name}.yaml"
    assert file.read_text() == budgets.text(name)
    ladder, budget = load_ladder(str(file)), budgets.LADDERS[name]
    planned = jobs(ladder)
    assert len(planned) == len(budget.students) * len(budget.methods) * len(budget.seeds)
    for job in planned:
        assert job.config.train.epochs * budgets.STEPS_PER_EPOCH == budget.steps
        assert job.config.train.batch_size == 32


def test_the_ladder_of_decoders_differs_by_the_decoder_alone():
    planned = jobs(load_ladder(str(LAB / "decoders.yaml")))
    assert len(planned) == 2 * 2 * 5
    for a in planned:
        (b,) = (other for other in planned if (other.student, other.seed) == (a.student, a.seed) and other is not a)
        assert {a.config.data.decoder, b.config.data.decoder} == {"pillow", "simplejpeg"}
        assert a.config.model_copy(update={"data": b.config.data, "name": b.config.name}) == b.config
        assert a.config.data.model_copy(update={"decoder": b.config.data.decoder}) == b.config.data


def test_jpeg_copies_hold_the_same_images(few, tmp_path):
    data.write(tmp_path / "images.tar", data.images("train", few))
    jpegs.main(str(tmp_path / "images.tar"), str(tmp_path / "jpegs.tar"))
    png, jpeg = (open_source(f"tar:{tmp_path / name}", "data.train") for name in ("images.tar", "jpegs.tar"))
    assert jpeg.classes == png.classes and list(jpeg.targets) == list(png.targets)
    for i in range(len(png)):
        assert jpeg[i][0].size == (256, 256)
        assert np.abs(np.asarray(jpeg[i][0].resize((64, 64)), float) - np.asarray(png[i][0])).mean() < 12


def test_every_student_is_trained_without_a_teacher_and_with_the_default():
    default = load_recipe("own-data")
    for label in budgets.STUDENTS:
        budgeted = [b for b in budgets.LADDERS.values() if label in b.students and b.of is budgets.METHODS]
        assert {b.steps for b in budgeted} >= {300, 1500}
        assert all({"no teacher", "DIST", "own-data"} <= set(b.methods) for b in budgeted)
    for job in jobs(load_ladder(str(LAB / "steps-300.yaml"))):
        if job.method == "own-data":
            assert job.config.losses == default.losses
            assert job.config.balance == default.balance


def test_shares_are_read_from_the_logs(tmp_path):
    for name, clip, logged in (("a", 5.0, range(100, 600, 100)), ("b", None, [7]), ("c", 5.0, [])):
        run = tmp_path / "runs" / "CNN" / name / "seed-0"
        run.mkdir(parents=True)
        (run / "recipe.yaml").write_text(yaml.safe_dump({"train": {"clip_grad": clip}}))
        events = [
            {
                "event": "step",
                "step": step,
                "losses": {"ce": 1.0, "fd.s3": 1.0, "fd.s4": step / 100, "total": 2 + step / 100},
                "grad_norm": 10.0,
                "gradient_shares": {"ce": 0.25, "fd": 0.75},
            }
            for step in logged
        ]
        events = [*events, {"event": "step", "step": 1}, {"event": "finished", "top1": 12.0}]
        (run / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    shares.main(tmp_path)
    first, second = json.loads((tmp_path / "shares.json").read_text())
    assert [point["step"] for point in first["points"]] == [100, 300, 500]
    assert first["points"][2]["loss"] == {"ce": round(1 / 7, 4), "fd": round(6 / 7, 4)}
    page = (tmp_path / "shares.md").read_text()
    assert "| CNN/a/seed-0 | 12.0 | 300 | ce 20, fd 80 | ce 25, fd 75 | 10.0 | 50 % |" in page
    assert second["run"] == "CNN/b/seed-0" and "not clipped" in page


def test_weights_are_converted_in_order():
    model = timm.create_model("resnet10t", channels=[8, 8, 8, 8], stem_width=8)
    theirs = {f"their.{k}.{name.rpartition('.')[2]}": t for k, (name, t) in enumerate(model.state_dict().items())}
    ours = student.in_order(theirs, model)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in ours.items())
    swapped = dict(reversed(theirs.items()))
    with pytest.raises(SystemExit, match="is not"):
        student.in_order(swapped, model)
    with pytest.raises(SystemExit, match="tensors, the model"):
        student.in_order(dict([*theirs.items()][1:]), model)
