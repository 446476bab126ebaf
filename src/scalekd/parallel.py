"""One process or many: torchrun's environment, and the few collective calls that a run makes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .errors import UserError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def processes(device: str | None = None) -> Iterator[torch.device]:
    """Joins torchrun's process group when WORLD_SIZE > 1; yields this process's device, leaves the group at the end."""
    chosen = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def pick_device(device: str | None = None) -> torch.device:
    """The named device, else this process's GPU, else the CPU. `UserError` if the named one is not there."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: no such kind of device; write cpu, cuda or cuda:1")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this machine has no usable GPU; leave --device out to run on the CPU")
    if chosen == torch.device("cuda"):
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: this machine has {torch.cuda.device_count()} GPU(s), counted from 0")
    return chosen


def sum_over_processes(values: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def copy_buffers_of_first(module: nn.Module) -> None:
    """Gives every process the first one's buffers, such as the running statistics of batch norms."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()
