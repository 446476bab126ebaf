"""Gives a distiller the speed and memory that a recipe asks for: precisions, recomputation, memory format, streams."""

from __future__ import annotations

import torch

from scalekd.common.errors import UserError
from scalekd.config.fields import DistillationTrain
from scalekd.config.recipe import Config
from scalekd.models.half import hold_in
from scalekd.models.recompute import recompute_blocks

from .distiller import Distiller
from .streams import SideStream


def reshape_step(distiller: Distiller, config: Config) -> None:
    """Changes what a step computes and keeps, on any device: teachers in half precision, blocks that run again.

    Raises `UserError` if the student's blocks are not known.
    """
    for name, teacher in distiller.teachers.items():
        if precision := config.all_teachers[name].precision:
            hold_in(teacher.view, precision)
    if config.train.grad_checkpointing:
        recompute_blocks(distiller.student, "student.model")


def move(distiller: Distiller, config: Config, device: torch.device) -> None:
    """Moves `distiller` to the device, in the recipe's memory format and with its streams. Compile it after that.

    On a GPU it sets PyTorch's precision of float32 products for the whole process, as `train.tf32` says. Raises
    `UserError` if the device cannot do what the recipe asks for.
    """
    train = config.train
    _check_device(train, device)
    distiller.to(device)
    if train.channels_last:
        distiller.to(memory_format=torch.channels_last)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if train.tf32 else "highest")
        if train.streams:
            distiller.beside = SideStream(device)


def _check_device(train: DistillationTrain, device: torch.device) -> None:
    """Raises `UserError` for settings that the device does not have."""
    if device.type == "cpu":
        for name in ("cuda_graphs", "tf32"):
            if getattr(train, name):
                raise UserError(f"train.{name} needs a GPU; set train.{name}=false to train on the CPU")
    elif train.tf32 and train.precision != "float32":
        raise UserError(
            f"train.tf32: has an effect with train.precision float32, and this run has {train.precision}; set train.tf32=false"
        )
    elif train.tf32 and torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError(f"train.tf32: {torch.cuda.get_device_name(device)} has no TF32; set train.tf32=false")
