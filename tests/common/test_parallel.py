"""Two processes on the CPU give the results of one, and torchrun brings a killed one back; the choice of a device."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import launcher
import pytest
import torch
import yaml
from rich.console import Console
from whole_runs import PLAIN_LOSSES, assert_same, changed, events, final_state

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.config.recipe import check_config
from scalekd.models.student_file import load_student
from scalekd.runs.distillation import execute
from scalekd.runs.students import evaluate_student
from scalekd.train.log import read_log

VAL_IMAGES = 261  # odd, and more than one batch of validation


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def train_command(recipe: dict[str, Any], folder: Path, out: str) -> list[str]:
    path = folder / f"{out}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return ["-m", "scalekd", "train", str(path), "--out", str(folder / out), "--device", "cpu"]


def with_two(recipe: dict[str, Any], folder: Path, *options: str) -> Path:
    """Trains in `folder` with two processes."""
    both = launcher.two_processes(*train_command(recipe, folder, "two"), *options, env=ENVIRONMENT)
    assert [done.returncode for done in both] == [0, 0], both
    assert [done.stdout.count("student.safetensors") for done in both] == [1, 0]  # the last line, of one process
    return folder / "two"


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any], image_folder: Path) -> dict[str, Any]:
    """SGD, whose steps are as precise as its gradients, and many validation images."""
    for folder in (image_folder / "val").iterdir():
        for i in range(4, VAL_IMAGES // 3):
            shutil.copy(folder / f"{i % 4}.png", folder / f"{i}.png")
    tiny_recipe["optim"] = {"name": "momentum", "lr": 0.01}
    return tiny_recipe


@pytest.mark.slow
@pytest.mark.usefixtures("recipe")  # many validation images
def test_two_processes_give_the_run_of_one(plain_recipe, tmp_path):
    """Without batch norm, and with accumulation: the same global batches, so the same losses, balance and weights."""
    losses = {name: options | {"weight": 0.1} for name, options in PLAIN_LOSSES.items() if options}
    losses = dict(sorted({"ce": {}, "kd": {}, "fm": {}, **losses}.items()))  # in the order of the YAML file
    recipe = changed(plain_recipe, losses=losses, train={"accumulate": 2}, balance={"every": 2})
    two, one = with_two(recipe, tmp_path), tmp_path / "one"
    execute(check_config(recipe, "test"), one, torch.device("cpu"), Console(quiet=True), check=False)
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    logs = [[e for e in read_log(folder) if e["event"] != "finished"] for folder in (two, one)]
    for a, b in zip(*logs, strict=True):
        assert (a["event"], a["step"]) == (b["event"], b["step"])
        if a["event"] == "step":
            assert a["losses"] == pytest.approx(b["losses"], rel=1e-4)
            assert a["gradient_shares"] == pytest.approx(b["gradient_shares"], abs=2e-4)
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
    folder = with_two(recipe, tmp_path, "--no-preflight")
    logged = [e for e in read_log(folder) if e["event"] == "validation"][-1]
    result, _ = evaluate_student(folder, recipe["data"]["val"], "cpu", Console(quiet=True))
    assert result == pytest.approx({key: logged[key] for key in result}, rel=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("recipe")  # many validation images
def test_two_processes_end_early_together(plain_recipe, tmp_path):
    """With a learning rate that changes nothing, no validation is better than the first one."""
    recipe = changed(
        plain_recipe,
        losses={"embed": {}},
        student={"embedding": {"dim": 8}},
        train={"epochs": 4, "patience": 1, "best_by": "map_at_r", "accumulate": 2},
        optim={"lr": 1e-12},
    )
    two, one = with_two(recipe, tmp_path), tmp_path / "one"
    execute(check_config(recipe, "test"), one, torch.device("cpu"), Console(quiet=True), check=False)
    for folder in (two, one):
        log = read_log(folder)
        assert [e["event"] for e in log][-3:] == ["validation", "ended_early", "finished"] and log[-1]["steps"] == 6
    figures = [[e for e in read_log(folder) if e["event"] == "validation"][-1] for folder in (two, one)]
    for key in ("recall_at_1", "map_at_r", "knn", "queries"):
        assert figures[0][key] == pytest.approx(figures[1][key], abs=1e-3)


def wait_for_step(folder: Path, step: int, running: launcher.Running) -> None:
    while running.poll() is None:
        if (folder / "log.jsonl").is_file() and any(e.get("step") == step for e in read_log(folder)):
            return
        time.sleep(0.002)
    raise AssertionError(f"the run ended before step {step}")


def workers_of(launcher: int) -> list[int]:
    """The training processes by rank, without data loader workers."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                environment = dict(v.split("=", 1) for v in (entry / "environ").read_text().split("\0") if "=" in v)
                if parent == launcher and "RANK" in environment:
                    found[int(environment["RANK"])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


@pytest.fixture
def long_recipe(random_recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with every source of randomness, averaged weights, twelve steps, and a checkpoint after each."""
    random_recipe["train"] |= {"epochs": 4, "save_minutes": 0, "accumulate": 1}
    return random_recipe


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes through /proc")
def test_a_killed_process_is_brought_back_and_ends_as_one_left_alone(long_recipe, tmp_path):
    """After kill -9 of one process, torchrun --max-restarts resumes both from the last checkpoint."""
    whole = with_two(long_recipe, tmp_path, "--no-preflight")
    parts = tmp_path / "parts"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    command += [*train_command(long_recipe, tmp_path, "parts"), "--no-preflight"]
    with open(tmp_path / "output.txt", "w") as output:
        env = ENVIRONMENT | {"PYTHON_EXEC": str(launcher.stand_ins() / "python")}  # what torchrun starts
        running = launcher.start(*command, env=env, stdout=output, stderr=output)
        wait_for_step(parts, 5, running)
        os.kill(workers_of(running.pid)[1], signal.SIGKILL)
        assert running.wait(250) == 0, (tmp_path / "output.txt").read_text()
    (resumed,) = events(parts, "resumed")
    assert 4 <= resumed["step"] < 12
    assert_same(final_state(parts), final_state(whole))
    assert_same(*(load_student(folder)[0].state_dict() for folder in (parts, whole)))


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
    ("asked", "gpus", "message"),
    [("cuda", 0, "no usable GPU"), ("cuda:2", 2, r"2 GPU\(s\), counted from 0"), ("tpux", 0, "unknown kind of device")],
)
def test_devices_that_are_not_there(monkeypatch, asked, gpus, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=f"`device` {asked}: .*{message}"):
        parallel.pick_device(asked)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="2 GPU"):
        parallel.pick_device()
