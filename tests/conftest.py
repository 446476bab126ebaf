"""What the tests share: a small folder of images, a small recipe on it, and the command line as a function."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from small_images import write_images

from scalekd.cli import main

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may download anything

TINY: dict[str, Any] = {  # test_resnet <- test_vit, a second or two on one core
    "name": "tiny",
    "data": {"train": "TRAIN", "val": "VAL", "image_size": 32, "workers": 0},
    "augment": {"crop": "pad", "pad": 2},
    "student": {"model": "test_resnet"},
    "teacher": {"model": "test_vit", "kwargs": {"depth": 4}, "weights": "random"},
    "losses": {"ce": {}, "kd": {}, "scalekd": {}},
    "train": {"epochs": 2, "batch_size": 8, "log_every": 1},
    "optim": {"name": "adamw", "lr": 1e-3},
}


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """train/ with 8 and val/ with 4 images of each of three classes, 40x40 pixels."""
    root = tmp_path / "images"
    write_images(root / "train", per_class=8)
    write_images(root / "val", per_class=4, seed=1)
    return root


@pytest.fixture
def tiny_recipe(image_folder: Path) -> dict[str, Any]:
    """A recipe for `image_folder` as plain values, to be changed at will: 2 epochs of 3 steps."""
    recipe = copy.deepcopy(TINY)
    recipe["data"] |= {"train": str(image_folder / "train"), "val": str(image_folder / "val")}
    return recipe


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_recipe: dict[str, Any]) -> Path:
    """`tiny_recipe` as a YAML file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe))
    return path


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
        except SystemExit as stop:  # argparse's own way out
            code = int(stop.code or 0)
        return Result(code, *capsys.readouterr())

    return run
