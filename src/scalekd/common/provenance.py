"""Provenance of a result: command, library versions, machine and git commit."""

from __future__ import annotations

import functools
import os
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


@functools.cache
def git_state() -> str | None:
    """The commit of scalekd's own checkout, with '+' if it has local changes, when this process asked first.

    None outside of one, also if this code is in the repository of another project, such as in its environment.
    """
    return commit_of(Path(__file__).resolve().parents[1])


def commit_of(package: Path) -> str | None:
    """The commit of the repository whose `src/scalekd` is `package` and that tracks its files; None otherwise."""
    try:
        top = Path(_git(package, "rev-parse", "--show-toplevel"))
        if top.resolve() / "src" / "scalekd" != package.resolve():
            return None
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        commit, changed = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain", ".")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit[:12] + ("+" if changed else "")


def _git(folder: Path, *command: str) -> str:
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}  # set inside git hooks
    done = subprocess.run(["git", *command], cwd=folder, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()
