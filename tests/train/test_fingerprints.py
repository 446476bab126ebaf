"""A run resumes with the data, teacher and versions that it was started with, or says what differs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from damage import some_of
from safetensors.torch import load_file, save_file
from small_images import write_images
from whole_runs import TINY, events
from whole_runs import changed as with_sections

from scalekd.cli.app import main
from scalekd.common.errors import UserError
from scalekd.data.fingerprint import Listing, changed, differences, fingerprint
from scalekd.data.sources.open import open_source
from scalekd.train import fingerprints


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A folder with images, a teacher in `teacher` and a stopped run in `run`; recipe.yaml has paths relative to it."""
    root = tmp_path_factory.mktemp("inputs")
    write_images(root / "train", per_class=9)
    write_images(root / "val", per_class=4, seed=1)
    recipe = with_sections(TINY, losses={"ce": {}}, teacher=None, train={"epochs": 1}, track=[])
    recipe["data"] |= {"train": "train", "val": "val"}
    (root / "ce.yaml").write_text(yaml.safe_dump(recipe))
    recipe |= {"losses": {"kd": {}}, "teacher": {"model": "teacher"}}
    (root / "kd.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for command in (["ce.yaml", "--out", "teacher"], ["kd.yaml", "--out", "run"]):
            assert main(["train", *command, "--no-preflight"]) == 0
    (root / "run" / "summary.json").unlink()
    return root


@pytest.fixture
def again(cli, stopped, tmp_path, monkeypatch):
    """`again(*overrides)` resumes a copy of the stopped run, in the current folder."""
    monkeypatch.chdir(shutil.copytree(stopped, tmp_path / "copy"))
    return lambda *overrides: cli("train", "kd.yaml", "--out", "run", "--no-preflight", *overrides)


def classes() -> list[str]:
    return sorted(os.listdir("train"))


def rename_a_class() -> None:
    for part in ("train", "val"):
        Path(part, classes_before[0]).rename(Path(part, "zz"))


classes_before: list[str] = []


def remove_a_file() -> None:
    next(Path("train").rglob("*.png")).unlink()


def add_a_file() -> None:
    file = next(Path("val").rglob("*.png"))
    shutil.copy(file, file.with_name("new.png"))


def replace_a_file() -> None:
    a, b = sorted(Path("train", classes_before[0]).iterdir())[:2]
    shutil.copy(a, b)


def same_size_other_content() -> None:
    file = sorted(Path("train", classes_before[0]).iterdir())[0]
    data = bytearray(file.read_bytes())
    data[-20] ^= 1  # in a checksum of PNG, which the decoder may or may not read
    file.write_bytes(data)


def export_the_teacher_anew() -> None:
    file = Path("teacher/student.safetensors")
    state = load_file(file)
    save_file({name: value + 0.01 * torch.ones_like(value) for name, value in state.items()}, file)
    card = file.with_suffix(".json")
    values = json.loads(card.read_text())
    del values["sha256"]
    card.write_text(json.dumps(values))


CHANGES = {
    rename_a_class: ("data", "data.train has class 0 is"),
    remove_a_file: ("data", "data.train has 26 images, 27 before"),
    add_a_file: ("data", "data.val has 13 images, 12 before"),
    replace_a_file: ("data", "data.train has files"),
    same_size_other_content: ("data", "data.train has files with other contents"),
    export_the_teacher_anew: ("teacher", "the weights of teacher changed"),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_other_inputs_are_rejected_and_can_be_allowed(again, change):
    classes_before[:] = classes()
    change()
    kind, message = CHANGES[change]
    result = again()
    assert result.code == 2 and message in result.err and f'"train.resume_anyway=[{kind}]"' in result.err
    assert len(result.err.splitlines()) == 2
    assert ("(1 file, such as train/" in result.err) == (change in (replace_a_file, same_size_other_content))
    assert again("train.resume_anyway=[versions]").code == 2
    allowed = again(f"train.resume_anyway=[{kind}]")
    assert allowed.code == 0, allowed.err
    assert message in allowed.out and any(message in event["text"] for event in events(Path("run"), "notice"))
    Path("run/summary.json").unlink()
    assert again().code == 0  # these are the run's inputs now


def test_another_version_is_rejected(again, monkeypatch):
    monkeypatch.setattr(fingerprints, "versions", lambda: {"scalekd": "0.0.9", "torch": "1.0", "timm": "0.9"})
    result = again()
    assert result.code == 2 and "torch 1.0, " in result.err and "[versions]" in result.err
    assert again("train.resume_anyway=[data,versions]").code == 0


def test_equal_inputs_in_copied_files_are_the_same(again):
    for file in Path("train").rglob("*.png"):
        os.utime(file, (1, 1))
    result = again()
    assert result.code == 0 and "continues" not in result.out


@pytest.mark.parametrize("damage", [None, "", "[]", '{"data": []}', '{"data": {}, "teacher": 3, "versions": {}}'])
def test_a_run_of_an_older_version_resumes_with_a_notice(again, damage):
    file = Path("run/inputs.json")
    file.unlink() if damage is None else file.write_text(damage)
    result = again()
    assert result.code == 0 and "run has no readable inputs.json" in result.out
    assert json.loads(file.read_text())["data"]["train"]["images"] == 27


def test_another_machine_gives_a_notice(again):
    file = Path("run/inputs.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"machine": "CPU, 64 threads"}))
    result = again()
    assert result.code == 0 and "before on CPU, 64 threads: results may differ in rounding" in result.out


def test_a_run_without_a_checkpoint_starts_with_the_new_data(again):
    Path("run/last.pt").unlink()
    Path("run/previous.pt").unlink(missing_ok=True)
    remove_a_file()
    assert again().code == 0


def test_a_bad_image_that_was_repaired_is_no_other_data(again):
    file, other = sorted(Path("train", classes()[0]).iterdir())[:2]
    content = file.read_bytes()
    file.write_bytes(b"damaged")
    assert again("train.resume_anyway=[data]").code == 0  # as if it had been started so
    Path("run/summary.json").unlink()
    Path("run/bad-images.txt").write_text(f"train\t{file}\tPillow does not recognise it\n")
    file.write_bytes(content)
    wrong = other.read_bytes()
    other.write_bytes(content)
    refused = again("--on-bad-image", "skip")
    assert refused.code == 2 and f"(1 file, such as {other})" in refused.err
    other.write_bytes(wrong)
    mended = again("--on-bad-image", "skip")
    assert mended.code == 0, mended.err
    assert f"continues with 1 image that could not be read before and changed since, such as {file}" in mended.out
    assert not Path("run/bad-images.txt").read_text()


def test_files_that_could_not_be_opened_are_told_apart(tmp_path):
    paths = [str(tmp_path / name) for name in "abc"]
    for path in paths[:2]:
        Path(path).write_bytes(b"1")
    os.mkfifo(paths[2])
    listing = Listing(["x"], [0, 0, 0], paths, paths)
    before = fingerprint(listing)
    assert changed(before, before, listing) == {}
    Path(paths[1]).write_bytes(b"2")
    Path(paths[2]).unlink()
    Path(paths[2]).write_bytes(b"1")
    now = fingerprint(listing)
    assert changed(before, now, listing) == {1: True, 2: False}
    assert changed(now, fingerprint(listing._replace(labels=[0, 0, 1])), listing) is None
    assert changed(before | {"files": "?"}, now, listing) is None  # of an older version, or damaged


def test_damaged_inputs_are_other_inputs_or_none(tmp_path):
    """Without a traceback."""
    paths = [str(tmp_path / name) for name in "abc"]
    for path in paths:
        Path(path).write_bytes(b"1")
    listing = Listing(["x", "y"], [0, 0, 1], paths, paths)
    images = SimpleNamespace(listed=lambda: listing)
    config = SimpleNamespace(train=SimpleNamespace(resume_anyway=()))
    run: Any = SimpleNamespace(train_images=images, val_images=images, config=config)
    now = {"data": dict.fromkeys(("train", "val"), fingerprint(listing)), "teacher": {"teacher": ["a", None]}}
    now |= {"versions": {"torch": "2"}, "machine": "CPU"}
    fingerprints.write_inputs(now, tmp_path)
    (tmp_path / "last.pt").touch()
    (tmp_path / "bad-images.txt").write_text("train\ta\tempty\n")
    for name, content in some_of(tmp_path, ["inputs.json", "bad-images.txt"], 60):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        try:
            fingerprints.data_changes(tmp_path, now["data"])
            fingerprints.teacher_changes(tmp_path, {"teacher": "b"})
            fingerprints.check_inputs(run, now, tmp_path)
        except UserError as error:
            assert "train.resume_anyway=" in str(error)
        except Exception as error:
            raise AssertionError(f"{name}: {content[:3000]!r}") from error
        (tmp_path / name).write_bytes(before)


def test_every_source_has_a_fingerprint_of_its_pixels(tmp_path):
    """`Images.listed` of a source without files, such as IDX, reads pixels."""
    from scalekd.data.batches import Images

    source = open_source("fashion-mnist:test", "data.train")
    before = fingerprint(Images(source, range(100), None, 0).listed())
    assert fingerprint(Images(source, range(100), None, 0).listed()) == before
    source.images = source.images.copy()
    source.images[0, 3, 3] ^= 1
    now = fingerprint(Images(source, range(100), None, 0).listed())
    assert differences(before, now) == ["files with other contents"]
    assert differences(before, fingerprint(Images(source, range(1, 101), None, 0).listed())) != []
