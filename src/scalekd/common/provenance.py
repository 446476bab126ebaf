"""What made a result: versions, command, machine, weights by checksum, git state."""

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
    """For people: the rows of a report that tell what made a run, of its provenance."""
    named = ", ".join(f"{key} {made[key]}" for key in ("scalekd", "torch", "timm") if key in made)
    rows = {"machine": made.get("machine"), "versions": named, "command": made.get("command")}
    return {row: str(told) for row, told in rows.items() if told}


def command_line() -> str:
    """How this process was started: `scalekd train ...`, or `python FILE ...` from Python."""
    program = Path(sys.argv[0])
    ours = program.stem == "scalekd" or program.parts[-2:] == ("scalekd", "__main__.py")
    return shlex.join([*(["scalekd"] if ours else ["python", sys.argv[0]]), *sys.argv[1:]])


def versions() -> dict[str, str]:
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
    """The commit of the code that runs, with '+' if it has local changes; None outside a checkout."""
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
