"""Turns out-of-memory errors, of the device or of data loader workers, into messages with a setting to try."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from .errors import UserError, first_line

# PyTorch, CUDA, cuBLAS and cuDNN each have their own wording
OUT_OF_MEMORY = re.compile(
    r"out of memory|can.t allocate memory|cannot allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE
)
SHARED = re.compile(r"shared memory|bus error|/torch_\w+>?:? No space left", re.IGNORECASE)
FILES = re.compile(r"too many open files|exit code 24\b", re.IGNORECASE)  # 24: EMFILE, see data/workers.py
UNSENT = "exit code 28"  # ENOSPC: a worker could not send a batch
WORKER = re.compile(r"DataLoader worker \(pid.*?\) (?:is killed by signal: |exited unexpectedly)([\w ]*)")


def is_worker_death(error: BaseException) -> bool:
    """Whether PyTorch reports that a data loader worker died. It raises this in the middle of any other work."""
    return WORKER.search(str(error)) is not None


@contextlib.contextmanager
def explain_out_of_memory(device: torch.device, remedy: str) -> Iterator[None]:
    """Raises `UserError` in place of an out-of-memory error. remedy: how to use less memory of the device."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        message = _message(error, device, remedy)
        if message is None:
            raise
        raise UserError(message) from None


def _message(error: Exception, device: torch.device, remedy: str) -> str | None:
    text = str(error)
    killed = WORKER.search(text)
    if FILES.search(text):
        return (
            "the data loader has too many open files.\n"
            "Raise the limit in the shell (`ulimit -n 4096`), or try data.workers=0."
        )
    if SHARED.search(text) or UNSENT in text:
        return (
            "the data loader workers are out of shared memory (/dev/shm).\n"
            "Try data.workers=0, or provide more: docker run --shm-size=8g, or --ipc=host."
        )
    if killed:
        return (
            f"a data loader worker was killed ({killed[1].strip() or 'no reason given'}), "
            "usually by the system because memory is short.\nTry fewer workers, or none: data.workers=0."
        )
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or OUT_OF_MEMORY.search(text):
        full = torch.device("cpu") if isinstance(error, MemoryError) or "CPUAllocator" in text else device
        return f"out of memory on {_size(full)}: {first_line(error)}\n{remedy}"
    return None


def _size(device: torch.device) -> str:
    if device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        return f"{device}, {torch.cuda.get_device_name(device)} with {gib:.0f} GiB"
    return f"this machine with {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
