"""Out of memory, of the device or of the processes that read images: told with the setting to try, not as a trace."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from .errors import UserError, first_line

# PyTorch, CUDA, cuBLAS and cuDNN each say it in their own words
OUT_OF_MEMORY = re.compile(
    r"out of memory|can.t allocate memory|cannot allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE
)
SHARED = re.compile(r"shared memory|bus error|/torch_\w+>?:? No space left", re.IGNORECASE)
WORKER = re.compile(r"DataLoader worker \(pid.*?\) (?:is killed by signal: |exited unexpectedly)([\w ]*)")


@contextlib.contextmanager
def explain_out_of_memory(device: torch.device, remedy: str) -> Iterator[None]:
    """Turns a shortage of memory into a `UserError`. remedy: what uses less of the device's memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        told = _told(error, device, remedy)
        if told is None:
            raise
        raise UserError(told) from None


def _told(error: Exception, device: torch.device, remedy: str) -> str | None:
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
        return f"out of memory on {_size(of)}: {first_line(error)}\n{remedy}"
    return None


def _size(device: torch.device) -> str:
    if device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        return f"{device}, {torch.cuda.get_device_name(device)} with {gib:.0f} GiB"
    return f"this machine with {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
