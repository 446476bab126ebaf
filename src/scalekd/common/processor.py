"""The processor of this machine: the cores that this process may use, and its bf16 instructions."""

from __future__ import annotations

import os
from pathlib import Path


def cores() -> int:
    """The number of CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def asked_threads() -> int | None:
    """The number of threads that OMP_NUM_THREADS asks for; None if it is not set, or not a number above 0."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list has one entry per nesting level
    return int(first) if first.isdecimal() and int(first) > 0 else None


def bf16_instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The bf16 instructions of this CPU, as Linux names them. Without any, `train.precision=bf16` is slower than float32."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), None)
    if flags is None:
        return "unknown"
    return ", ".join(name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in flags) or "none"
