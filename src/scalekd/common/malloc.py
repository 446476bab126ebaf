"""Training on a CPU: keep freed memory for the next step instead of handing it back to the system."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_freed_memory() -> bool:
    """Raises glibc's thresholds for this process; False where there is no glibc.

    By default it maps large tensors anew at every step, and every page of them faults: tens of thousands of
    page faults a step for a small ViT (docs/log.md has the figures).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    # the largest values: 32 MiB is glibc's own bound for the first, an int holds the others
    return bool(
        mallopt(M_MMAP_THRESHOLD, 1 << 25) and mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1) and mallopt(M_TOP_PAD, 1 << 28)
    )
