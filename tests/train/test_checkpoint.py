"""Checkpoints: complete or rejected, and never code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from scalekd.common import files
from scalekd.common.errors import UserError
from scalekd.train import checkpoint

STATE = {"student": {"w": torch.arange(2000.0)}, "step": 3, "history": [{"top1": 50.0}], "ema": None}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "last.pt", STATE)
    return tmp_path / "last.pt"


def test_load_gives_what_was_saved(path):
    state = checkpoint.load(path)
    assert torch.equal(state.pop("student")["w"], STATE["student"]["w"])
    assert state == {"format": checkpoint.FORMAT} | {k: v for k, v in STATE.items() if k != "student"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_full_disk_leaves_the_old_file(path, monkeypatch):
    before, whole = path.read_bytes(), os.fdopen

    def full(descriptor, mode):
        os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)
        return whole(descriptor, mode)

    monkeypatch.setattr(files.os, "fdopen", full)
    with pytest.raises(UserError, match=r"cannot write .*last\.pt: .*No space left.*intact"):
        checkpoint.save(path, STATE)
    monkeypatch.undo()
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]
    assert path.read_bytes() == before


def test_failure_of_any_kind_leaves_the_old_file(path):
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(path, {"student": lambda: None})
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]
    assert path.read_bytes() == before


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        checkpoint.save(tmp_path / "nowhere" / "last.pt", STATE)


def flip_a_weight(raw: bytes) -> bytes:
    at = raw.index(torch.arange(1000.0, 1002.0).numpy().tobytes())
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:10],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        lambda raw: b"hello",
        lambda raw: pickle.dumps({"format": 1}),
        flip_a_weight,
    ],
    ids=["empty", "10 bytes", "half", "less one byte", "text", "plain pickle", "one bit"],
)
def test_damaged_file_is_refused_by_name(path, damage):
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"last\.pt is damaged or not a checkpoint"):
        checkpoint.load(path)


@pytest.mark.parametrize("content", [{"student": {}}, {"format": 0}, [1, 2], torch.zeros(2)])
def test_other_format_is_refused_by_name(path, content):
    torch.save(content, path)
    with pytest.raises(UserError, match=r"last\.pt is not a checkpoint of this version"):
        checkpoint.load(path)


class Touch:
    """Creates a file when unpickled by a loader that runs code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_is_run(path, tmp_path):
    torch.save({"format": checkpoint.FORMAT, "student": Touch(tmp_path / "touched")}, path)
    with pytest.raises(UserError, match=r"last\.pt is damaged or not a checkpoint"):
        checkpoint.load(path)
    assert not (tmp_path / "touched").exists()
