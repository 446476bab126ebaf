"""Folders from someone else: links, FIFOs and names in them reach no file outside."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

import scalekd
from scalekd.common.errors import UserError
from scalekd.common.files import append_to, in_use, reject_links, write_text
from scalekd.models.student_file import export_onnx, load_student
from scalekd.train import checkpoint

PRECIOUS = "alias ls='ls -l'\n"


@pytest.fixture
def stranger(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


@pytest.fixture
def precious(tmp_path) -> Path:
    """A file of the user's, outside of every run's folder; unchanged by the test."""
    file = tmp_path / "home" / ".bashrc"
    file.parent.mkdir()
    file.write_text(PRECIOUS)
    yield file
    assert file.read_text() == PRECIOUS and os.listdir(file.parent) == [".bashrc"]


def commands(run: Path, root: Path) -> list[list[object]]:
    """Commands that read or write a run's folder."""
    return [
        ["export", run],
        ["report", run],
        ["report", root / "run", "--baseline", run],
        ["report", root / "run", "--analysis", run],
        ["evaluate", run, "--data", root / "val"],
        ["predict", run, root / "val"],
        ["push", run, "ada/birds", "--dry-run"],
        ["train", root / "tiny.yaml", "--out", run, "--no-preflight"],
        ["train", root / "tiny.yaml", "--out", run.parent / "new", f"student.model={run}", "--dry-run"],
        ["compare", "own-ladder", "--data", root, "--out", run],
        ["analyze", "similarity", root / "run", run],
    ]


@pytest.mark.parametrize("name", ["student.json.part", "new.part", "log.jsonl", "tensorboard"])
def test_a_link_out_of_a_run_is_rejected_by_every_command(cli, stranger, finished, precious, name):
    path = stranger / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(precious.parent if name == "tensorboard" else precious)
    for command in commands(stranger, finished):
        result = cli(*command)
        assert result.code == 2 and f"{path} is a link out of" in result.err, (command, result.err)


def test_links_below_and_relative_ones(stranger, precious):
    link = stranger / "tensorboard" / "a" / "b"
    link.parent.mkdir()
    link.symlink_to("../../../home/.bashrc")
    with pytest.raises(UserError, match="is a link out of"):
        reject_links(stranger)
    link.unlink()
    link.symlink_to("../../last.pt")  # stays inside
    (stranger.parent / "alias").symlink_to(stranger)
    reject_links(stranger.parent / "alias")
    load_student(stranger.parent / "alias")
    (stranger.parent / "run2").mkdir()  # a sibling whose name starts like the folder's
    (stranger / "x").symlink_to("../run2")
    with pytest.raises(UserError, match="is a link out of"):
        reject_links(stranger)


def test_a_fifo_in_a_run_is_rejected_and_not_opened(cli, stranger, finished):
    os.mkfifo(stranger / "bad-images.txt")
    for command in commands(stranger, finished):
        result = cli(*command)
        assert result.code == 2 and "bad-images.txt is a FIFO; remove it" in result.err, command


@pytest.mark.parametrize("name", ["log.jsonl", ".lock"])
def test_no_writer_follows_a_link(tmp_path, precious, name):
    """Also where nobody looked at the folder first."""
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / name
    for link in (path, folder / f"{name}.part"):
        link.symlink_to(precious)
    with pytest.raises(OSError):
        append_to(path)
    with pytest.raises(UserError, match="is a link out of"), in_use(folder):
        pass
    write_text(path, "new")
    assert path.read_text() == "new" and not path.is_symlink()
    path.unlink()
    path.symlink_to(precious)
    checkpoint.save(path, {"step": 1}, previous=folder / "previous.pt")
    assert checkpoint.load(path)["step"] == 1


def test_all_files_are_written_by_common_files():
    """Other writers would follow links: the exceptions create new files only, or write nothing of a run's."""
    writes = re.compile(
        r"(?<!\.)\bopen\(.*\"[wax]b?\"|\)\.save\((folder|path|out)\b|\.write_(text|bytes)\(|os\.open\(.*O_(WRONLY|RDWR)|np\.save"
    )
    exceptions = {"common/files.py", "train/trackers.py", "distill/teacher_outputs.py", "common/screen.py"}
    exceptions |= {"transfer/synthetic_scenes.py"}  # writes into an empty folder only
    exceptions |= {"models/formats.py", "runs/quantize.py"}  # write into a temporary folder only
    source = Path(scalekd.__file__).parent
    found = {str(f.relative_to(source)) for f in source.rglob("*.py") if writes.search(f.read_text())}
    assert found == exceptions


def test_onnx_is_not_written_through_a_link(stranger, precious):
    student, card = load_student(stranger)
    for name in ("student.onnx", "student.onnx.part", "student.onnx.data"):
        (stranger / name).symlink_to(precious)
    assert export_onnx(student, stranger / "student.onnx", card) < 1e-4
    assert (stranger / "student.onnx").stat().st_size > 10_000
    assert not [p for p in stranger.iterdir() if p.name.endswith(".part") and p.is_dir()]


def test_a_stopped_run_goes_on_after_leftovers_of_a_killed_process(cli, finished, tmp_path):
    """A copy that travelled in a tar archive; leftovers are removed, also links to files in the folder."""
    with tarfile.open(tmp_path / "run.tar", "w") as tar:
        tar.add(finished / "run", "run")
    shutil.unpack_archive(tmp_path / "run.tar", tmp_path, filter="data")
    run = tmp_path / "run"
    (run / "summary.json").unlink()
    (run / "last.pt.part").write_bytes(b"cut off")
    (run / "student.json.12.part").symlink_to("log.jsonl")
    before = (run / "log.jsonl").read_bytes()
    assert cli("train", finished / "tiny.yaml", "--out", run, "--no-preflight").code == 0
    assert (run / "log.jsonl").read_bytes().startswith(before)
    assert not list(run.glob("*.part")) and torch.load(run / "last.pt", weights_only=True)["format"]


def test_commands_to_copy_are_quoted(cli, finished, tmp_path):
    folder = tmp_path / "a b;touch x"
    shutil.copytree(finished / "run", folder)
    (folder / "student.safetensors").unlink()
    result = cli("train", finished / "tiny.yaml", "--out", tmp_path / "new", f'student.model="{folder}"', "--dry-run")
    assert result.code == 2 and f"`scalekd export '{folder}'`" in result.err
