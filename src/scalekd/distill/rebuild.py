"""Rebuilds a trained run from its recipe and checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from scalekd.common.errors import UserError, first_line
from scalekd.common.files import reject_links
from scalekd.common.yaml_file import parse_yaml
from scalekd.config.recipe import Config, check_config

from .build import build
from .run import DistillationRun


def read_recipe(folder: Path) -> Config:
    """The recipe in a run's folder. Raises `UserError`."""
    reject_links(folder)
    recipe = folder / "recipe.yaml"
    try:
        text = recipe.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{recipe} cannot be read: {first_line(error)}") from None
    return check_config(parse_yaml(text, str(recipe)), str(recipe))


def rebuild(config: Config, device: torch.device) -> DistillationRun:
    """`config` built for evaluation. Call `load_trained` next: the student and the methods have initial values.

    The checkpoint holds the student's weights, also the averaged ones, so the weights that the student started from
    need not exist any more and no average is kept. Batch norms are not synchronised: that needs GPUs, and changes
    nothing in evaluation. Raises `UserError` if the data or the teacher cannot be opened.
    """
    student = config.student.model_copy(update={"weights": None, "prefix": None})
    train = config.train.model_copy(update={"sync_batchnorm": False, "ema": None})
    data = config.data.model_copy(update={"decoder": "pillow"})  # evaluation needs no package for training images
    return build(config.model_copy(update={"student": student, "train": train, "data": data}), device, strict=False)


def load_trained(run: DistillationRun, state: dict[str, Any], path: Path) -> int:
    """Loads the student and the methods of the checkpoint `state`, read from `path`; returns its step.

    The student gets `state["student"]`, the weights that the methods were trained with. `state["deployed"]`, the
    exported ones, is checked to fit. Raises `UserError` if the checkpoint does not fit the recipe.
    """
    student, methods = run.distiller.student, run.distiller.methods
    try:
        student.load_state_dict(state["deployed"])
        student.load_state_dict(state["student"])
        methods.load_state_dict(state["methods"])
        return int(state["progress"]["step"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path} does not fit {path.parent / 'recipe.yaml'}: {first_line(error)}") from None
