"""Distributed training: joins torchrun's process group and wraps the collective calls that a run makes.

Without a process group every function acts as in a group of one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .errors import UserError
from .stop import Stopped, current

T = TypeVar("T")
PEER_GONE = re.compile(r"gloo.*(closed|reset|refused|timed out|timeout)|NCCL.*remote|Broken pipe", re.IGNORECASE | re.S)


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def processes(device: str | None = None) -> Iterator[torch.device]:
    """Joins torchrun's process group if WORLD_SIZE > 1, yields this process's device, and leaves the group at the end.

    Raises `UserError` if the device does not exist, or if another process of the group ended.
    """
    chosen = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        # gloo as well as nccl: what the processes exchange between steps must not wait for the GPUs
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", **_init_options())
    try:
        yield chosen
    except RuntimeError as error:
        if world() > 1 and PEER_GONE.search(str(error)):
            if number := current().number:  # the signal that stopped the other one
                raise Stopped(number, current().saved) from None
            raise UserError(
                "another process of this run ended, so this one stops too; see the message of that process"
            ) from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _init_options() -> dict[str, Any]:
    """Arguments of `init_process_group` that give each torchrun restart its own key-value store.

    torchrun reuses its store after a restart, with the addresses of dead workers in it (pytorch issue 167288).
    On one node the restart count identifies the attempt. Nodes may count differently, so on several torch's default
    is kept.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if attempt is None or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store, rank, world_size = next(dist.rendezvous("env://"))
    return {"store": dist.PrefixStore(f"scalekd-{attempt}", store), "rank": rank, "world_size": world_size}


def pick_device(device: str | None = None) -> torch.device:
    """The named device, else this process's GPU, else the CPU. Raises `UserError` if the named one does not exist."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"`device` {device}: unknown kind of device; choose cpu, cuda or cuda:1")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"`device` {device}: this machine has no usable GPU; omit `device` to run on the CPU")
    if chosen == torch.device("cuda"):
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"`device` {device}: this machine has {torch.cuda.device_count()} GPU(s), counted from 0")
    return chosen


def sum_over_processes(values: Tensor) -> Tensor:
    """Sums `values` over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def highest(*values: int) -> list[int]:
    """The maximum of each value over the processes. Communicates on the CPU."""
    together = torch.tensor(values)
    if dist.is_initialized():
        dist.all_reduce(together, dist.ReduceOp.MAX)
    return together.tolist()


def gather(value: T) -> list[T]:
    """The values of all processes, ordered by rank. They must be picklable."""
    values: list[Any] = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """The value of rank 0, on every process. It must be picklable."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]


def copy_buffers_of_first(module: nn.Module) -> None:
    """Broadcasts the buffers of rank 0, such as the running statistics of batch norms."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def wait_for_all() -> None:
    """A barrier."""
    if dist.is_initialized():
        dist.barrier()
