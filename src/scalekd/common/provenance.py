"""Provenance of a result: command, library versions, machine and git commit."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .version import __version__


def made_by(made: dict[str, Any]) -> dict[str, str]:
    """The machine, versions and command in a run's provenance, as rows of a report."""
    names = ", ".join(f"{key} {made[key]}" for key in ("scalekd", "torch", "timm") if key in made)
    rows = {"machine": made.get("machine"), "versions": names, "command": made.get("command")}
    return {row: str(value) for row, value in rows.items() if value}


def command_line() -> str:
    """The command that started this process: `scalekd train ...`, or `python FILE ...`."""
    program = Path(sys.argv[0])
    ours = program.stem == "scalekd" or program.parts[-2:] == ("scalekd", "__main__.py")
    return shlex.join([*(["scalekd"] if ours else ["python", sys.argv[0]]), *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Versions of scalekd, PyTorch, timm, torchvision and Python."""
    import timm
    import torchvision

    return {
        "scalekd": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }


def machine(device: torch.device) -> str:
    """The name of the GPU, or of the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        model = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")),
            model,
        )
    return f"CPU, {model}, {torch.get_num_threads()} threads"


def git_state() -> str | None:
    """The commit of the running code, with '+' if it has local changes; None outside a checkout."""
    here = Path(__file__).parents[1]
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "."], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit[:12] + ("+" if changed else "")
