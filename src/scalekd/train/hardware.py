"""Chooses `train.precision`, `train.channels_last` and `data.workers` for the device where a recipe says `auto`.

A run's recipe.yaml holds what was chosen, so a run that resumes on another device keeps its arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from scalekd.common.errors import UserError
from scalekd.common.files import is_file
from scalekd.common.processor import bf16_instructions, cores
from scalekd.common.sections import AUTO, Section
from scalekd.common.yaml_file import parse_yaml

C = TypeVar("C", bound=Section)
MOST_WORKERS = 8  # per GPU
MOST_WORKERS_CPU = 4  # they compete with training for the cores


def for_device(config: C, device: torch.device, folder: Path | None = None, threads: int | None = None) -> C:
    """The recipe with a value for the device in place of every `auto`.

    folder: of the run. If it began before, `precision` and `channels_last` are those of its recipe.yaml. threads: CPU
    cores for this run; by default those of the process.
    """
    return resolved(config, device, held_in(folder) if folder else {}, threads)


def resolved(config: C, device: torch.device, held: Mapping[str, Any], threads: int | None = None) -> C:
    """`for_device` with the values of `train` that a run began with, such as `{"precision": "bf16"}`."""
    train, data = config.train, config.data  # type: ignore[attr-defined]
    chosen: dict[str, Any] = {}
    if train.precision == AUTO:
        chosen["precision"] = held.get("precision") or precision_for(device)
    if train.channels_last == AUTO:
        known = held.get("channels_last")
        chosen["channels_last"] = device.type in ("cpu", "cuda") if known is None else known
    workers = workers_for(data.workers, device, threads)
    if not chosen and workers == data.workers:
        return config
    sections = {"train": train.model_copy(update=chosen), "data": data.model_copy(update={"workers": workers})}
    return config.model_copy(update=sections)


def precision_for(device: torch.device) -> Literal["float32", "bf16", "fp16"]:
    """bf16 where the device has instructions for it; else fp16 on a GPU with tensor cores; else float32."""
    if device.type != "cuda":
        return "float32" if bf16_instructions() in ("none", "unknown") else "bf16"
    major, _ = torch.cuda.get_device_capability(device)
    return "bf16" if major >= 8 else "fp16" if major >= 7 else "float32"


def workers_for(workers: int | str, device: torch.device, threads: int | None = None) -> int:
    """`workers`, or if it is `auto` the number of data workers that suits the device and the cores of this process."""
    if isinstance(workers, int):
        return workers
    mine = threads or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device.type == "cuda":
        return max(1, min(MOST_WORKERS, mine - 1))
    return min(MOST_WORKERS_CPU, mine // 2)


def workers_of(config: Any) -> int:
    """`data.workers` of a recipe without `auto`, as a number for the type checker."""
    return int(config.data.workers)


def held_in(folder: Path) -> dict[str, Any]:
    """The section `train` of the recipe in a run's folder; {} if there is none, or it cannot be read."""
    recipe = folder / "recipe.yaml"
    try:
        values = parse_yaml(recipe.read_text(encoding="utf-8"), str(recipe)) if is_file(recipe) else None
    except (OSError, UnicodeDecodeError, UserError):
        return {}  # opening the folder reports it
    train = values.get("train") if isinstance(values, dict) else None
    held = train if isinstance(train, dict) else {}
    fits = {"precision": ("float32", "bf16", "fp16"), "channels_last": (True, False)}
    return {key: held[key] for key, valid in fits.items() if held.get(key) in valid}
