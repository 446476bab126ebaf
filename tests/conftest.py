"""Shared fixtures: a small folder of images, small recipes for it, and the command line as a function."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from launcher import no_fsync
from small_images import write_images
from whole_runs import PLAIN_LOSSES, TINY, changed

from scalekd.cli.app import main

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may download anything
os.fsync = no_fsync  # as in the processes that it starts


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """train/ with 8 and val/ with 4 images of each of three classes, 40x40 pixels."""
    root = tmp_path / "images"
    write_images(root / "train", per_class=8)
    write_images(root / "val", per_class=4, seed=1)
    return root


@pytest.fixture
def tiny_recipe(image_folder: Path) -> dict[str, Any]:
    """A recipe for `image_folder` as plain values, which a test may change: 2 epochs of 3 steps."""
    recipe = copy.deepcopy(TINY)
    recipe["data"] |= {"train": str(image_folder / "train"), "val": str(image_folder / "val")}
    return recipe


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_recipe: dict[str, Any]) -> Path:
    """`tiny_recipe` as a YAML file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe))
    return path


@pytest.fixture
def random_recipe(tiny_recipe: dict[str, Any]) -> dict[str, Any]:
    """The tiny recipe with every source of randomness, and with averaged weights."""
    return changed(
        tiny_recipe,
        data={"workers": 2},  # so that the samples' seeds do not reach this process
        augment={"mixup": 0.2, "cutmix": 1.0, "erase": 0.5, "auto_augment": "rand-m7-mstd0.5"},
        student={"kwargs": {"drop_path_rate": 0.3}},
        train={"ema": 0.9, "accumulate": 2},
        schedule={"warmup_epochs": 1},
    )


@pytest.fixture
def light_recipe(tiny_recipe: dict[str, Any]) -> dict[str, Any]:
    """The tiny recipe with logit losses only, for tests that do not depend on the methods."""
    return changed(tiny_recipe, losses={"ce": {}, "kd": {}})


@pytest.fixture
def plain_recipe(tiny_recipe: dict[str, Any]) -> dict[str, Any]:
    """A student and methods without batch norm, and SGD, whose steps are as precise as its gradients."""
    return changed(
        tiny_recipe,
        data={"image_size": 64},  # at 48 the student's last map would be 1x1
        student={"model": "test_convnext"},
        losses=PLAIN_LOSSES,
        optim={"name": "momentum", "lr": 0.01},
    )


@pytest.fixture
def cheap_initial_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """For models of full size: drawing their random numbers takes longer than a step with them; these repeat."""
    uniform, normal = torch.rand(2**20), torch.randn(2**20)

    def filled(tensor, block):
        for part in tensor.view(-1).split(len(block)):
            part.copy_(block[: len(part)])
        return tensor

    def uniform_(tensor, low=0.0, high=1.0, generator=None):
        return filled(tensor, uniform[: tensor.numel()] * (high - low) + low)

    def normal_(tensor, mean=0.0, std=1.0, generator=None):
        return filled(tensor, normal[: tensor.numel()] * std + mean)

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform_)
    monkeypatch.setattr(torch.Tensor, "normal_", normal_)
    monkeypatch.setattr(torch.Tensor, "erfinv_", lambda tensor: tensor)  # truncated normal: uniform will do


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`cli("train", recipe, "optim.lr=1")` -> exit code, stdout and stderr."""

    def run(*args: object) -> Result:
        capsys.readouterr()
        try:
            code = main([str(a) for a in args])
        except SystemExit as stop:  # raised by argparse
            code = int(stop.code or 0)
        return Result(code, *capsys.readouterr())

    return run
