"""Loads the state of a step whose loss was not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from scalekd.common.sections import validated
from scalekd.common.yaml_file import parse_yaml
from scalekd.config.recipe import check_config
from scalekd.distill.build import build
from scalekd.train import checkpoint
from scalekd.train.resume import load_snapshot
from scalekd.train.run import Run
from scalekd.transfer.tasks import task_of


def load_report(path: Path, device: torch.device) -> tuple[Run, list[Any], int]:
    """The run as it stood before the step that `report` saved, the step's batches, and its number from 1."""
    content = checkpoint.load(path)
    run = _built(parse_yaml(content["recipe"], str(path)), str(path), device)
    load_snapshot(run, content["state"], str(path))
    batches = [run.batch(images, targets) for images, targets in zip(content["images"], content["targets"])]
    return run, batches, content["step"]


def _built(recipe: dict[str, Any], where: str, device: torch.device) -> Run:
    """The run of a recipe of any task."""
    task = task_of(recipe)
    if task is None:
        return build(check_config(recipe, where), device)
    from scalekd.transfer import config

    from . import transfer as train

    return train.build(validated(config.SCHEMAS[task], recipe, where), device)
