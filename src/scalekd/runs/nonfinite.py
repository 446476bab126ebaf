"""Loads a nonfinite-step-N.pt, to reproduce the step whose loss or gradient was not finite."""

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
    """Reads a file that `scalekd.train.health.report` wrote.

    Returns the run in its state before the step, the step's micro-batches, and the step's number, counted from 1.
    """
    content = checkpoint.load(path)
    run = _built(parse_yaml(content["recipe"], str(path)), str(path), device)
    load_snapshot(run, content["state"], str(path))
    batches = [run.batch(images, targets) for images, targets in zip(content["images"], content["targets"])]
    return run, batches, content["step"]


def _built(recipe: dict[str, Any], where: str, device: torch.device) -> Run:
    """Builds a recipe of any task."""
    task = task_of(recipe)
    if task is None:
        return build(check_config(recipe, where), device, strict=False)
    from scalekd.transfer.config import SCHEMAS

    from .transfer import build as build_transfer

    return build_transfer(validated(SCHEMAS[task], recipe, where), device)
