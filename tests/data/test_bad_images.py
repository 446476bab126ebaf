"""Images that cannot be read stop the run, or are skipped, listed and counted, with reproducible batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from whole_runs import Interrupted, start

from scalekd.common.errors import UserError
from scalekd.data.batches import Images, eval_batches, train_batches, training_images, validation_images
from scalekd.data.images import Bad, BadImages, read_list
from scalekd.data.options import Augment, Data
from scalekd.data.samplers import TrainSampler
from scalekd.data.sources.open import open_source
from scalekd.data.split import open_split
from scalekd.train.log import read_log

TRAIN_BAD = ["bee/2.png", "bee/3.png"]  # one after the other, so the first one's place is taken by bee/4.png


@pytest.fixture
def damaged_folder(image_folder: Path) -> Path:
    """Two bad images of 24 for training and one of 12 for validation: the most that are allowed."""
    for name in TRAIN_BAD:
        (image_folder / "train" / name).write_bytes(b"")
    (image_folder / "val" / "cat" / "1.png").write_bytes((image_folder / "val" / "cat" / "1.png").read_bytes()[:900])
    return image_folder


@pytest.fixture
def light_file(tmp_path: Path, light_recipe: dict[str, Any]) -> Path:
    path = tmp_path / "light.yaml"
    path.write_text(yaml.safe_dump(light_recipe))
    return path


def data_of(folder: Path, **more: object) -> Data:
    values = {"train": str(folder / "train"), "val": str(folder / "val"), "image_size": 32, "on_bad_image": "skip"}
    return Data.model_validate(values | more)


def train_images(data: Data) -> Images:
    return training_images(open_split(data), data, Augment(), (0.5,) * 3, (0.2,) * 3, seed=3)


def batches(images: Images, workers: int = 0, start: int = 0) -> list:
    return list(train_batches(images, TrainSampler(len(images), 8, 3, 6, start), workers, pin=False))


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("workers, start_step", [(2, 0), (0, 4), (2, 4)])
def test_batches_depend_on_neither_workers_nor_start(damaged_folder, workers, start_step):
    data = data_of(damaged_folder)
    whole = batches(train_images(data))
    for a, b in zip(batches(train_images(data), workers, start_step), whole[start_step:], strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) and a.skipped == b.skipped
    assert all(len(b.images) == 8 for b in whole)


def test_the_next_good_image_takes_the_place(damaged_folder):
    data = data_of(damaged_folder)
    images = train_images(data)
    good = training_images(open_split(data), data, Augment(crop="none", flip=0), (0.5,) * 3, (0.2,) * 3, seed=3)
    place = [images.source.where(i).endswith("bee/2.png") for i in images.indices].index(True)
    assert torch.equal(good[0, place].image, good[0, place + 2].image)
    assert [b.name for b in images[0, place].skipped] == [f"{damaged_folder}/train/{name}" for name in TRAIN_BAD]
    assert images[0, place].target == 1
    assert not torch.equal(images[0, place].image, images[1, place].image)  # augmented by its own key


def test_the_last_image_is_followed_by_the_first(image_folder):
    (image_folder / "train" / "cat" / "7.png").write_bytes(b"")
    images = train_images(data_of(image_folder))
    assert images[0, 23].target == 0 and len(images[0, 23].skipped) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_without_skip_the_first_is_named(damaged_folder, workers):
    with pytest.raises(UserError, match=r"bee/[23]\.png: it is empty .*set data.on_bad_image=skip to train without it"):
        batches(train_images(data_of(damaged_folder, on_bad_image="error")), workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many(damaged_folder, workers):
    (damaged_folder / "train" / "ant" / "0.png").write_bytes(b"text")
    with pytest.raises(
        UserError, match=r"3 of 24 images cannot be read, and data\.max_bad allows 2\. The first: .*png"
    ):
        batches(train_images(data_of(damaged_folder)), workers)
    assert len(batches(train_images(data_of(damaged_folder, max_bad=0.2)), workers)) == 6
    with pytest.raises(UserError, match=r"1 of 24 images cannot be read, and data\.max_bad allows 0|allows 0"):
        batches(train_images(data_of(damaged_folder, max_bad=0)), workers)


def test_more_bad_ones_in_a_row_than_are_allowed(image_folder):
    for i in range(8):
        (image_folder / "train" / "bee" / f"{i}.png").unlink()
        (image_folder / "train" / "bee" / f"{i}.png").mkdir()
    (image_folder / "train" / "bee" / "whole.png").write_bytes((image_folder / "train" / "ant" / "0.png").read_bytes())
    assert len(train_images(data_of(image_folder))) == 17  # a folder is no image
    for i in range(8):
        (image_folder / "train" / "bee" / f"b{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"of 25 images cannot be read, and data\.max_bad allows 2"):
        batches(train_images(data_of(image_folder)))


@pytest.mark.parametrize(
    "images, share, allowed",
    [
        (9, 0.01, 0),
        (12, 0.01, 1),
        (24, 0.01, 2),
        (100, 0.01, 3),
        (1000, 0.01, 10),
        (1000, 0.29, 290),
        (1000, 0, 0),
        (9, 1, 9),
    ],
)
def test_how_many_are_allowed(images, share, allowed):
    assert BadImages("train", images, share).allowed == allowed


# ---------------------------------------------------------------- validation


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_leaves_them_out(damaged_folder, workers):
    data = data_of(damaged_folder)
    images = validation_images(open_split(data), data, Augment())
    found = list(eval_batches(images, 5, workers, pin=False))
    assert [len(b.targets) for b in found] == [5, 4, 2]
    assert torch.cat([b.targets for b in found]).tolist() == [0] * 4 + [1] * 4 + [2] * 3
    assert list(images.bad.found) == [f"{damaged_folder}/val/cat/1.png"]


def test_a_batch_without_a_good_image(image_folder):
    (image_folder / "val" / "ant" / "0.png").write_bytes(b"")
    data = data_of(image_folder)
    found = list(eval_batches(validation_images(open_split(data), data, Augment()), 1, 0, pin=False))
    assert [len(b.targets) for b in found] == [1] * 11


def test_no_good_image_at_all(cli, light_file, image_folder, tmp_path):
    for file in (image_folder / "val").rglob("*.png"):
        file.write_bytes(b"")
    options = ["--on-bad-image", "skip", "data.max_bad=1", "--no-preflight", "train.epochs=1"]
    result = cli("train", light_file, "--out", tmp_path / "run", *options)
    assert result.code == 2 and "none of the 4 validation images of the class ant can be read" in result.err


# ---------------------------------------------------------------- the list


def test_names_cannot_forge_a_line(tmp_path):
    bad = BadImages("train", 100, 0.5)
    bad.keep_in(tmp_path)
    bad.add([Bad("a\tb\nval\tc.png\tno reason", "line\r\nbreak \x1b[31m")])
    text = (tmp_path / "bad-images.txt").read_text()
    assert text == "train\ta\\tb\\nval\\tc.png\\tno reason\tline\\r\\nbreak \\x1b[31m\n"
    bad.add([Bad("not UTF-8 \udcff", "again")])
    assert [part for part, _, _ in read_list(tmp_path)] == ["train", "train"]


def test_the_list_is_taken_up_again(tmp_path):
    first = BadImages("train", 100, 0.03)
    first.keep_in(tmp_path)
    first.add([Bad("a", "x"), Bad("b", "x"), Bad("a", "x")])
    (tmp_path / "bad-images-1.txt").write_text(
        "train\tc\tof another process\nval\tc\tnot of this set\ntrain\thalf a li"
    )
    again = BadImages("train", 100, 0.04)
    again.add([Bad("b", "x"), Bad("e", "x")])  # as the pre-flight does, before there is a folder
    again.keep_in(tmp_path)
    assert sorted(again.found) == ["a", "b", "c", "e"]
    with pytest.raises(
        UserError, match=rf"5 of 100 .* allows 4\. The first: .*\. {tmp_path}/bad-images.txt lists them\."
    ):
        again.add([Bad("d", "x")])
    lines = (tmp_path / "bad-images.txt").read_text().splitlines()
    assert sorted(lines) == [
        "train\ta\tx",
        "train\tb\tx",
        "train\tc\tof another process",
        "train\td\tx",
        "train\te\tx",
        "val\tc\tnot of this set",
    ]
    assert not (tmp_path / "bad-images-1.txt").exists()


def test_half_a_line_is_left_alone(tmp_path):
    (tmp_path / "bad-images.txt").write_text("train\ta\tx\ntrain\tb")
    bad = BadImages("train", 100, 0.03)
    bad.keep_in(tmp_path)
    bad.add([Bad("b", "x")])
    assert read_list(tmp_path) == [("train", "a", "x"), ("train", "b", "x")]


# ---------------------------------------------------------------- whole runs


def test_a_run_skips_counts_and_lists(cli, light_file, damaged_folder, tmp_path):
    run = tmp_path / "run"
    result = cli("train", light_file, "--on-bad-image", "skip", "--out", run)
    assert result.code == 0, result.err
    assert "cannot be opened, such as" in " ".join(result.out.split())  # pre-flight
    assert "3 unreadable images skipped; see" in result.out
    assert json.loads((run / "summary.json").read_text())["bad_images"] == 3
    listed = [line.split("\t") for line in (run / "bad-images.txt").read_text().splitlines()]
    assert sorted((part, name) for part, name, _ in listed) == [
        ("train", f"{damaged_folder}/train/{TRAIN_BAD[0]}"),
        ("train", f"{damaged_folder}/train/{TRAIN_BAD[1]}"),
        ("val", f"{damaged_folder}/val/cat/1.png"),
    ]
    assert {reason for *_, reason in listed} == {"it is empty (0 bytes)", "image file is truncated"}
    assert [e["images"] for e in read_log(run) if e["event"] == "validation"] == [11, 11]
    result = cli("evaluate", run, "--data", damaged_folder / "val")
    assert result.code == 2 and f"cannot read {damaged_folder}/val/cat/1.png: " in result.err


def test_a_dry_run_writes_no_list(cli, light_file, damaged_folder, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = cli("train", light_file, "--on-bad-image", "skip", "--dry-run", "--out", tmp_path / "run")
    assert result.code == 0 and sorted(tmp_path.rglob("*")) == before


def test_a_run_that_goes_on_is_the_run_in_one_go(light_recipe, damaged_folder, tmp_path):
    light_recipe["data"]["on_bad_image"] = "skip"
    light_recipe["train"] |= {"save_minutes": 0}
    whole = start(light_recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        start(light_recipe, tmp_path / "parts", stop_at=4)
    parts = start(light_recipe, tmp_path / "parts")
    for a, b in zip(whole.deployed.state_dict().values(), parts.deployed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    lists = [sorted((tmp_path / name / "bad-images.txt").read_text().splitlines()) for name in ("whole", "parts")]
    assert lists[0] == lists[1] and len(lists[0]) == 3


def test_too_many_stop_a_run_and_are_listed(cli, light_file, damaged_folder, tmp_path):
    (damaged_folder / "train" / "ant" / "5.png").write_bytes(b"")
    result = cli("train", light_file, "--on-bad-image", "skip", "--no-preflight", "--out", tmp_path / "run")
    assert result.code == 2 and f"{tmp_path}/run/bad-images.txt lists them." in result.err
    assert len((tmp_path / "run" / "bad-images.txt").read_text().splitlines()) == 3
    result = cli("train", light_file, "--on-bad-image", "skip", "--out", tmp_path / "run")  # from the pre-flight
    assert result.code == 2 and "3 of 24 images cannot be read" in result.err


def test_a_value_that_nothing_reads(cli, light_file):
    result = cli("train", light_file, "data.max_bad=0.5", "--dry-run")
    assert (
        result.code == 2
        and "data.max_bad: has no effect here; it is used only with data.on_bad_image: skip" in result.err
    )
    assert yaml.safe_load(light_file.read_text())["data"].keys().isdisjoint({"on_bad_image", "max_bad"})


def test_a_run_that_stopped_at_a_bad_image_goes_on_without_it(cli, recipe_file, image_folder, tmp_path):
    """The fix in the message works with the same folder."""
    victim = image_folder / "train" / "ant" / "0.png"
    victim.write_bytes(victim.read_bytes()[:100])
    command = ["train", recipe_file, "--out", tmp_path / "run", "losses={ce: {}}", "teacher=null", "--no-preflight"]
    stopped = cli(*command)
    assert stopped.code == 2 and "set data.on_bad_image=skip to train without it" in stopped.err
    command += ["data.max_bad=0.1"]
    assert cli(*command, "--on-bad-image", "skip").code == 0
    assert str(victim) in (tmp_path / "run" / "bad-images.txt").read_text()


def test_a_message_proposes_only_what_the_command_takes(image_folder):
    (image_folder / "val" / "ant" / "0.png").write_bytes(b"")
    source = open_source(str(image_folder / "val"), "data")
    error = Images(source, range(len(source)), lambda image: image, None)[0, 0]  # as `evaluate` reads them
    assert str(error).endswith("it is empty (0 bytes). Remove or replace that file")
    split = open_split(Data(train=str(image_folder / "train"), val=str(image_folder / "val")))
    error = validation_images(split, Data(image_size=32), Augment())[0, 0]
    assert str(error).endswith("or set data.on_bad_image=skip to train without it.")
