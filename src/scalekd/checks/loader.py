"""Whether this machine has the shared memory and the open files that the data loader workers need."""

from __future__ import annotations

import math
import os
import resource
from typing import Any

from scalekd.common.text import counted
from scalekd.data.workers import count, tensors_of
from scalekd.train.run import Run

from .model import Check

SHARED_MEMORY = "/dev/shm"
PREFETCH = 2  # batches that PyTorch lets each worker prepare
FILES_OF_A_WORKER = 8  # pipes and locks


def workers_check(run: Run, batch: Any) -> list[Check]:
    """Compares what the workers need with what this machine has. batch: a training micro-batch; none if it has no workers.

    In a validation all prefetched training batches wait in shared memory, with at least one validation batch.
    """
    workers = count(run.config.data.workers)
    tensors = tensors_of(batch)
    if not workers or not tensors:
        return []
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    images = run.config.train.batch_size // (run.config.train.accumulate * int(os.environ.get("WORLD_SIZE", "1")))
    ahead = min(PREFETCH * workers, run.total_steps * run.config.train.accumulate)
    validation = size * min(run.eval_batch_size, len(run.val_images)) / max(1, images)
    rounds = min(PREFETCH * workers, math.ceil(len(run.val_images) / run.eval_batch_size))
    surely, most = (here * (ahead * size + n * validation) for n in (1, rounds))
    need = counted(workers, "worker") + (" needs" if workers == 1 else " need")
    low, high = (f"{math.ceil(size / 2**20)}" for size in (surely, most))
    told = f"{need} {low if low == high else f'{low} to {high}'} MiB of shared memory"
    fix = "Set data.workers=0 or fewer, or provide more: docker run --shm-size=8g, or --ipc=host"
    free = _free()
    if free is not None and free < most:
        told += f", and {SHARED_MEMORY} has {free / 2**20:.0f} MiB"
        return [Check("workers", "fail" if free < surely else "warn", told, fix)]
    files = len(tensors) * (ahead + rounds) + 2 * workers * FILES_OF_A_WORKER + _open_files()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and limit < files:
        fix = "Raise it in the shell (`ulimit -n 4096`), or set data.workers=0"
        return [Check("workers", "fail", f"{need} up to {files} open files, and the limit is {limit}", fix)]
    return [Check("workers", "ok", told)]


def _free() -> int | None:
    """Bytes; None where shared memory is no file system."""
    if not os.path.isdir(SHARED_MEMORY):
        return None
    found = os.statvfs(SHARED_MEMORY)
    return found.f_bavail * found.f_frsize


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 20
