"""Out of memory, of the device or of the processes that read images: told with the setting to try, not as a trace."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from . import parallel
from .config import Config
from .errors import UserError, first_line

# PyTorch, CUDA, cuBLAS and cuDNN each say it in their own words
OUT_OF_MEMORY = re.compile(
    r"out of memory|can.t allocate memory|cannot allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE
)
SHARED = re.compile(r"shared memory|bus error|/torch_\w+>?:? No space left", re.IGNORECASE)
WORKER = re.compile(r"DataLoader worker \(pid.*?\) (?:is killed by signal: |exited unexpectedly)([\w ]*)")


@contextlib.contextmanager
def shortages_told(device: torch.device, way_out: str) -> Iterator[None]:
    """Turns a shortage of memory into a `UserError`. way_out: what uses less of the device's memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        told = _told(error, device, way_out)
        if told is None:
            raise
        raise UserError(told) from None


def _told(error: Exception, device: torch.device, way_out: str) -> str | None:
    text = str(error)
    killed = WORKER.search(text)
    if SHARED.search(text):
        return (
            "the processes that read images are out of shared memory (/dev/shm).\n"
            "Try data.workers=0, or give more: docker run --shm-size=8g, or --ipc=host."
        )
    if killed:
        return (
            f"a process that reads images was ended from outside ({killed[1].strip() or 'no reason given'}), "
            "mostly by the system when memory is short.\nTry fewer, or none: data.workers=0."
        )
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or OUT_OF_MEMORY.search(text):
        of = torch.device("cpu") if isinstance(error, MemoryError) or "CPUAllocator" in text else device
        return f"out of memory on {_size(of)}: {first_line(error)}\n{way_out}"
    return None


def _size(device: torch.device) -> str:
    if device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        return f"{device}, {torch.cuda.get_device_name(device)} with {gib:.0f} GiB"
    return f"this machine with {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"


def smaller_steps(config: Config) -> str:
    """What to try: the same batch in twice as many parts, where it divides so, then half the batch."""
    train, world = config.train, parallel.world()
    most = train.batch_size // (2 * world)  # two images per process and part, for batch norm
    parts = [
        n
        for n in range(2 * train.accumulate, most + 1)
        if train.batch_size % (n * world) == 0 and _divides(config, train.batch_size // (n * world))
    ]
    tries = [f"train.accumulate={parts[0]} (the same batch in more parts)"] if parts else []
    whole = 2 * train.accumulate * world
    half = train.batch_size // 2 // whole * whole
    if half and _divides(config, half // (train.accumulate * world)):
        tries.append(f"train.batch_size={half}")
    now = f"train.batch_size={train.batch_size} train.accumulate={train.accumulate}"
    return f"Now {now}; try {', then '.join(tries) or 'a smaller data.image_size or a smaller model'}."


def _divides(config: Config, part: int) -> bool:
    """Whether images of one process and part are pairs where mixup needs them, with and without labels."""
    data, pairs = config.data, 2 if config.augment.mixup or config.augment.cutmix else 1
    unlabelled = round(part * data.unlabelled_share) if data.train and data.unlabelled else 0
    if data.train and data.unlabelled and unlabelled in (0, part):
        return False
    return unlabelled % pairs == 0 and (part - unlabelled) % pairs == 0
