"""File systems and files that are not as usual: no fsync, read-only, FIFOs, huge files, names that are not UTF-8."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
import torch

from scalekd.common.errors import UserError
from scalekd.common.files import make_folder, read_bytes, write_text
from scalekd.common.out_of_memory import explain_out_of_memory
from scalekd.data.images import MOST_BYTES, BadImage, read_file
from scalekd.data.sources.tars import Place
from scalekd.models.weights.match import sha256_of
from scalekd.train import checkpoint
from scalekd.transfer.segmentation.pairs import read_mask

STATE = {"weights": torch.arange(3)}


def failing(number: int):
    def fail(*args, **_):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", failing(number))
    checkpoint.save(tmp_path / "last.pt", STATE)
    write_text(tmp_path / "a.txt", "a")
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "last.pt"]


@pytest.mark.parametrize("call", ["open", "replace", "fsync"])
def test_a_disk_that_becomes_read_only(tmp_path, monkeypatch, call):
    checkpoint.save(tmp_path / "last.pt", STATE)
    before = (tmp_path / "last.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(errno.EROFS))
        patch.setattr(Path, "unlink", failing(errno.EROFS))
        for write in (lambda: checkpoint.save(tmp_path / "last.pt", {}), lambda: write_text(tmp_path / "last.pt", "")):
            with pytest.raises(
                UserError, match=r"cannot write .*last.pt: Read-only .*when the disk can be written again"
            ):
                write()
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.timeout(20)
def test_what_is_no_plain_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    for name, why in {"fifo": "a FIFO", "socket": ".", "zero": "a device", "folder": "directory"}.items():
        with pytest.raises(BadImage, match=why):
            read_file(str(tmp_path / f"{name}.png"))
        with pytest.raises(BadImage):
            read_mask(tmp_path / f"{name}.png")


@pytest.mark.timeout(60)
def test_a_fifo_among_the_images_is_a_bad_image(cli, recipe_file, image_folder, tmp_path):
    victim = sorted((image_folder / "train").rglob("*.png"))[0]
    victim.unlink()
    os.mkfifo(victim)
    plain = ("losses={ce: {}}", "teacher=null", "train.epochs=1", "--no-preflight")
    result = cli("train", recipe_file, "--out", tmp_path / "run", *plain)
    assert result.code == 2 and f"{victim}: it is a FIFO, not a plain file" in result.err
    result = cli("train", recipe_file, "--out", tmp_path / "skip", "--on-bad-image", "skip", *plain)
    assert result.code == 0, result.err


def test_a_file_larger_than_memory_is_not_read(tmp_path):
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(MOST_BYTES * 500)  # sparse: a terabyte that takes no space
    with pytest.raises(BadImage, match=r"it has 1,000\.0 GB, more than 2\.0 GB"):
        read_file(str(tmp_path / "huge.png"))
    with pytest.raises(BadImage, match=r"it has 1,000\.0 GB, more than 2\.0 GB"):
        Place(str(tmp_path / "huge.png"), 0, MOST_BYTES * 500).read()
    (tmp_path / "small").write_bytes(b"abc")
    assert read_bytes(tmp_path / "small", 3) == b"abc"
    assert sha256_of(tmp_path / "small").startswith("ba7816bf")


def test_a_folder_whose_name_is_not_utf8_is_rejected_at_the_start(cli, recipe_file, tmp_path):
    folder = os.fsdecode(bytes(tmp_path) + b"/r\xfcn")
    for command in (["train", recipe_file, "--out", folder], ["export", folder], ["report", folder]):
        result = cli(*command)
        assert result.code == 2 and r"r\udcfcn is not UTF-8; choose another folder" in result.err, result.err
    with pytest.raises(UserError, match="not UTF-8"):
        make_folder(Path(folder))
    assert not os.path.exists(folder)


def test_a_worker_that_is_killed_during_a_save_is_reported_as_that(tmp_path, monkeypatch):
    """PyTorch raises this in a signal handler, so anywhere in the main process."""
    checkpoint.save(tmp_path / "last.pt", STATE)

    def killed(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(UserError, match="a data loader worker was killed"):
        with explain_out_of_memory(torch.device("cpu"), ""):
            checkpoint.save(tmp_path / "last.pt", STATE)
    assert checkpoint.load(tmp_path / "last.pt")["weights"].tolist() == [0, 1, 2] and len(os.listdir(tmp_path)) == 1
