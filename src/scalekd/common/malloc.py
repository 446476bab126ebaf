"""Makes glibc keep freed memory for the next training step on a CPU instead of returning it to the system."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Raises glibc's malloc thresholds for this process. Returns False without glibc.

    By default glibc maps large tensors anew at every step, which costs a page fault per page: tens of thousands
    per step for a small ViT (docs/log.md has the figures).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    # the largest allowed values: glibc limits the first to 32 MiB, the others must fit an int
    return bool(
        mallopt(M_MMAP_THRESHOLD, 1 << 25) and mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1) and mallopt(M_TOP_PAD, 1 << 28)
    )
