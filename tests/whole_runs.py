"""Helpers for tests of whole runs: start one in this process, and compare its results."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from scalekd.checks.preflight import preflight
from scalekd.config.recipe import check_config
from scalekd.distill.build import build
from scalekd.distill.run import DistillationRun
from scalekd.train import checkpoint
from scalekd.train.engine import train
from scalekd.train.log import RunLog, read_log

TINY: dict[str, Any] = {  # test_resnet <- test_vit, a second or two on one core
    "name": "tiny",
    "data": {"train": "TRAIN", "val": "VAL", "image_size": 48, "workers": 0},
    "augment": {"crop": "pad", "pad": 2},
    "student": {"model": "test_resnet"},
    "teacher": {"model": "test_vit", "kwargs": {"depth": 4}, "weights": "random"},
    "losses": {"ce": {}, "kd": {}, "scalekd": {}},
    "train": {"epochs": 2, "batch_size": 8, "log_every": 1},
    "optim": {"name": "adamw", "lr": 1e-3},
}


# The parts of ScaleKD as separate losses. Combined, with random weights, the first vectors of the second view are so
# short that normalising them amplifies rounding errors.
PLAIN_LOSSES: dict[str, Any] = {"ce": {}, "kd": {}, "dfm": {"norm": "layer"}, "tpp": {"norm": "layer"}}

Recipe = dict[str, Any]
CPU = torch.device("cpu")


class Interrupted(Exception):
    """Stops a run at a chosen step."""


def start(recipe: Recipe, folder: Path, stop_at: int | None = None, check: bool = False) -> DistillationRun:
    """Trains or resumes a run in `folder`; raises `Interrupted` at step `stop_at`."""
    folder.mkdir(exist_ok=True)
    run = build(check_config(recipe, "test"), CPU)
    set_rate = run.schedule.step_update

    def step_update(step: int) -> None:
        if step == stop_at:
            raise Interrupted
        set_rate(step)

    run.schedule.step_update = step_update
    console = Console(file=io.StringIO())
    if check:
        preflight(run, console)
    log = RunLog(folder, console)
    try:
        train(run, folder, log)
    finally:
        log.close()
    return run


def changed(recipe: Recipe, **sections: Any) -> Recipe:
    """A copy with some values of some sections replaced."""
    recipe = copy.deepcopy(recipe)
    for name, values in sections.items():
        merge = isinstance(values, dict) and name != "losses"
        recipe[name] = recipe.get(name, {}) | values if merge else values
    return recipe


def assert_same(a: Any, b: Any) -> None:
    """Asserts that two structures of dicts, lists and tensors are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def final_state(folder: Path) -> dict[str, Any]:
    """The last checkpoint, without its elapsed time."""
    state = checkpoint.load(folder / "last.pt")
    del state["progress"]["elapsed"]
    return state


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run's log."""
    return [e for e in read_log(folder) if e["event"] == kind]
