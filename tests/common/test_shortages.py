"""Running out of memory, on the device, in the system or in /dev/shm, gives an error with a setting to try."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from whole_runs import changed, final_state

from scalekd.checks import step
from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.common.out_of_memory import explain_out_of_memory
from scalekd.config.recipe import check_config
from scalekd.data.batches import Images
from scalekd.distill.build import build
from scalekd.runs.memory import smaller_steps
from scalekd.train import engine

CPU = torch.device("cpu")
BUS = (
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit."
)


@pytest.fixture
def recipe_file(recipe_file: Path, tiny_recipe: dict) -> Path:
    recipe_file.write_text(json.dumps(changed(tiny_recipe, losses={"ce": {}}, teacher=None)))
    return recipe_file


def too_much(*args: object) -> None:
    torch.empty(1 << 60, dtype=torch.uint8)  # more than any machine has: PyTorch's own error


def cuda_is_full(*args: object) -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...\nmore")


def cublas_is_full(*args: object) -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def python_is_full(*args: object) -> None:
    raise MemoryError


@pytest.mark.parametrize("failing", [too_much, cuda_is_full, cublas_is_full, python_is_full])
def test_in_the_preflight(cli, recipe_file, tmp_path, monkeypatch, failing):
    monkeypatch.setattr(step, "forward_backward", failing)
    result = cli("train", recipe_file, "--out", tmp_path / "run")
    assert result.code == 2 and len(result.err.splitlines()) == 2, result.err
    assert result.err.startswith("scalekd: out of memory on this machine with ")
    assert result.err.endswith(
        "Now train.batch_size=8 train.accumulate=1; try train.accumulate=2 (the same batch in more micro-batches), then train.batch_size=4.\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("failing", [too_much, cuda_is_full])
def test_in_training_nothing_is_lost(cli, recipe_file, tmp_path, monkeypatch, failing):
    whole = engine.train_step

    def step(model, batches, run, at, *rest):
        if at == 4:
            failing()
        return whole(model, batches, run, at, *rest)

    monkeypatch.setattr(engine, "train_step", step)
    command = ["train", recipe_file, "--out", tmp_path / "run"]
    result = cli(*command)
    assert (
        result.code == 2
        and "out of memory" in result.err
        and "another run: choose a new folder with `--out`" in result.err
    )
    assert final_state(tmp_path / "run")["progress"]["step"] == 3
    assert "a run of another recipe" in cli(*command, "train.accumulate=2").err
    assert "resumes from step 3" not in cli(*command, "train.accumulate=2", "--out", tmp_path / "new").out
    monkeypatch.undo()
    assert "resumes from step 3" in cli(*command).out


@pytest.mark.parametrize("check", [(), ("--no-preflight",)])
def test_a_worker_that_is_killed(cli, recipe_file, tmp_path, monkeypatch, check):
    """As the system does when memory is short."""
    whole = Images.__getitem__

    def killed(self, key):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, key)

    monkeypatch.setattr(Images, "__getitem__", killed)
    command = ["train", recipe_file, "--out", tmp_path / "run", *check]
    result = cli(*command, "data.workers=1")
    assert result.code == 2 and len(result.err.splitlines()) == 2, result.err
    assert "a data loader worker was killed" in result.err and "data.workers=0" in result.err
    assert cli(*command, "data.workers=0").code == 0  # as the message says, in the same folder


@pytest.mark.parametrize("text", [BUS, "unable to write to file </torch_7_1>: No space left on device (28)"])
def test_shared_memory(text):
    with pytest.raises(UserError, match=r"out of shared memory \(/dev/shm\)\.\nTry data\.workers=0, or provide more"):
        with explain_out_of_memory(CPU, "way out"):
            raise RuntimeError(text)


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), UserError("out of memory")]
)
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as raised, explain_out_of_memory(CPU, "way out"):
        raise error
    assert raised.value is error


def test_the_device_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: type("P", (), {"total_memory": 80 * 2**30}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "NVIDIA X")
    with pytest.raises(
        UserError, match=r"^out of memory on cuda:1, NVIDIA X with 80 GiB: CUDA out of memory.*\nway out$"
    ):
        with explain_out_of_memory(torch.device("cuda:1"), "way out"):
            cuda_is_full()
    with pytest.raises(UserError, match=r"^out of memory on this machine with"):  # not of the GPU
        with explain_out_of_memory(torch.device("cuda:1"), "way out"):
            too_much()


@pytest.mark.parametrize(
    "batch_size, accumulate, mixup, world, expected",
    [
        (256, 2, 0, 1, ["train.accumulate=4", "train.batch_size=128"]),
        (256, 1, 0, 8, ["train.accumulate=2", "train.batch_size=128"]),
        (16, 1, 0, 8, []),
        (12, 2, 0, 1, ["train.accumulate=4", "train.batch_size=4"]),
        (12, 2, 0.2, 1, ["train.accumulate=6", "train.batch_size=4"]),  # in 4 parts, 3 images would not pair
        (18, 1, 0.2, 1, ["train.accumulate=3", "train.batch_size=8"]),
        (14, 1, 0, 1, ["train.accumulate=2", "train.batch_size=6"]),
        (2, 1, 0, 1, []),
    ],
)
def test_what_to_try_can_be_run(tiny_recipe, monkeypatch, batch_size, accumulate, mixup, world, expected):
    monkeypatch.setattr(parallel, "world", lambda: world)
    train = {"batch_size": batch_size, "accumulate": accumulate}
    data = {"train": "fashion-mnist:train", "val": "fashion-mnist:test", "limit": 1000}
    recipe = changed(tiny_recipe, data=data, train=train, augment={"mixup": mixup}, losses={"ce": {}}, teacher=None)
    message = smaller_steps(check_config(recipe, "test")).split("; try ")[1]
    tries = re.findall(r"train\.\w+=\d+", message)
    assert tries == expected
    assert tries or message == "a smaller data.image_size or a smaller model."
    for override in tries:
        key, value = override.removeprefix("train.").split("=")
        build(check_config(changed(recipe, train={key: int(value)}), "test"), CPU)


@pytest.mark.parametrize(
    ("share", "mixup", "tries"), [(0.5, 0, "accumulate=2"), (0.75, 0.2, "accumulate=2"), (0.9, 0.2, None)]
)
def test_what_to_try_leaves_images_with_and_without_labels(tiny_recipe, share, mixup, tries):
    data = {"unlabelled": "rest", "limit": 12, "unlabelled_share": share}
    recipe = changed(tiny_recipe, data=data, train={"batch_size": 16}, augment={"mixup": mixup})
    found = re.findall(r"train\.\w+=\d+", smaller_steps(check_config(recipe, "test")).split("; try ")[1])
    assert found[:1] == ([f"train.{tries}"] if tries else [])
