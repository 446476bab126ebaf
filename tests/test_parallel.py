"""Two real processes through torchrun on the CPU, against one; and which device a process takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from scalekd import parallel
from scalekd.config import check_config
from scalekd.errors import UserError
from scalekd.export import load_student
from scalekd.runlog import read_log
from scalekd.runs import evaluate_student, execute

VAL_IMAGES = 261  # odd, and more than one batch of validation


def torchrun(recipe: dict[str, Any], folder: Path, *options: str) -> Path:
    """Trains in `folder` with two processes."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "scalekd", "train", str(path), "--out", str(folder / "two"), "--device", "cpu", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("student.safetensors") == 1  # the last line, of one process
    return folder / "two"


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any], image_folder: Path) -> dict[str, Any]:
    """SGD, whose steps are as exact as its gradients, and many validation images."""
    for folder in (image_folder / "val").iterdir():
        for i in range(4, VAL_IMAGES // 3):
            shutil.copy(folder / f"{i % 4}.png", folder / f"{i}.png")
    tiny_recipe["optim"] = {"name": "momentum", "lr": 0.01}
    return tiny_recipe


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(recipe, tmp_path):
    """Without batch norm, and with accumulation: the same global batches, so the same losses and weights."""
    recipe["student"]["model"] = "test_convnext"
    recipe["losses"]["scalekd"] = {"norm": "layer"}
    recipe["train"]["accumulate"] = 2
    two, one = torchrun(recipe, tmp_path), tmp_path / "one"
    execute(check_config(recipe, "test"), one, torch.device("cpu"), Console(quiet=True), check=False)
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    logs = [[e for e in read_log(folder) if e["event"] != "finished"] for folder in (two, one)]
    for a, b in zip(*logs, strict=True):
        assert (a["event"], a["step"]) == (b["event"], b["step"])
        if a["event"] == "step":
            assert a["losses"] == pytest.approx(b["losses"], rel=1e-4)
        else:
            assert a["images"] == b["images"] == VAL_IMAGES
            assert (a["top1"], a["loss"]) == (pytest.approx(b["top1"]), pytest.approx(b["loss"], rel=1e-4))
    weights = [load_student(folder)[0].state_dict() for folder in (two, one)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_is_evaluated_is_what_is_exported(recipe, tmp_path):
    """With batch norm, whose running statistics differ between processes, and averaged weights."""
    recipe["losses"] = {"ce": {}, "kd": {}}
    recipe["train"] |= {"ema": 0.5, "epochs": 1}
    folder = torchrun(recipe, tmp_path, "--no-preflight")
    logged = [e for e in read_log(folder) if e["event"] == "validation"][-1]
    result = evaluate_student(folder, recipe["data"]["val"], "cpu")
    assert result == pytest.approx({key: logged[key] for key in result}, rel=1e-6)


def test_one_process_is_a_group_of_one():
    assert (parallel.rank(), parallel.world()) == (0, 1)
    assert torch.equal(parallel.sum_over_processes(torch.ones(2)), torch.ones(2))
    parallel.wait_for_all()
    with parallel.processes("cpu") as device:
        assert device == torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "expected"), [(None, "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")]
)
def test_each_process_takes_its_own_gpu(monkeypatch, asked, expected):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parallel.pick_device(asked) == torch.device(expected)


@pytest.mark.parametrize(
    ("asked", "gpus", "told"),
    [("cuda", 0, "no usable GPU"), ("cuda:2", 2, r"2 GPU\(s\), counted from 0"), ("tpux", 0, "no such kind of device")],
)
def test_devices_that_are_not_there(monkeypatch, asked, gpus, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=f"--device {asked}: .*{told}"):
        parallel.pick_device(asked)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="2 GPU"):
        parallel.pick_device()
