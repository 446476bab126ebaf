"""Times real steps of a recipe, plain feature distillation and the models alone: `scalekd cost --measure`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from scalekd.common.errors import UserError
from scalekd.common.out_of_memory import explain_out_of_memory
from scalekd.common.provenance import machine
from scalekd.config.recipe import Config
from scalekd.distill.build import make_optimizer, untrained
from scalekd.distill.compiled import compile_step
from scalekd.distill.distiller import Distiller
from scalekd.distill.levers import move
from scalekd.train.run import AUTOCAST

from .count import plain_distillation

ROUNDS = 5  # after one for warming up


def measure(config: Config, device: torch.device, *, classes: int = 1000, batch: int = 4) -> dict[str, Any]:
    """Times steps on random pixels, in turns: the recipe, `fd`, the student alone, the teacher's forward pass alone.

    `seconds` per step and `ratio`, the recipe's seconds divided by the others' within each round, are `[median, least,
    most]` of ROUNDS. The weights are initial values and the learning rate is 0. docs/how-to/cost.md. Raises `UserError`,
    also if the memory does not suffice.
    """
    if batch < 2:
        raise UserError(f"`batch` {batch}: must be 2 or more, because of batch normalisation")
    with explain_out_of_memory(device, f"Try a smaller `batch` (now {batch})."):
        distillers: dict[str, Distiller | None] = {"recipe": untrained(config, classes, config.losses)}
        distillers["fd"] = plain_distillation(config, classes)[0]
        distillers["student alone"] = untrained(config, classes, {"ce": {}}, teacher=False)
        steps = {name: _real_step(d, config, device, classes, batch) for name, d in distillers.items() if d is not None}
        first = distillers["recipe"]
        if first is not None and first.teacher_view is not None:
            pixels = torch.rand(batch, config.data.channels, *first.teacher_size, device=device)
            steps["teacher forward"] = lambda: _in_precision(config, device, lambda: first.teacher_features(pixels))
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(1 + ROUNDS):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds[name].append(time.perf_counter() - began)
    timed = {name: values[1:] for name, values in seconds.items()}
    recipe = timed["recipe"]
    return {
        "machine": machine(device),
        "batch": batch,
        "rounds": ROUNDS,
        "seconds": {name: spread(values) for name, values in timed.items()},
        "ratio": {
            name: spread([a / b for a, b in zip(recipe, values, strict=True)])
            for name, values in timed.items()
            if name != "recipe"
        },
    }


def _real_step(
    distiller: Distiller, config: Config, device: torch.device, classes: int, batch: int
) -> Callable[[], None]:
    optimizer = ready_for_steps(distiller, config, device)
    if config.train.compile:
        compile_step(distiller, batch, config.train.cuda_graphs)
    pixels = torch.rand(
        batch, config.data.channels, *map(max, distiller.image_size, distiller.teacher_size), device=device
    )
    targets = torch.randint(classes, (batch,), device=device)

    def step() -> None:
        losses = _in_precision(config, device, lambda: distiller(pixels, targets))
        losses["total"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ready_for_steps(distiller: Distiller, config: Config, device: torch.device) -> Optimizer:
    """Moves an untrained `distiller` to the device, in training mode; returns an optimiser that changes no weight."""
    move(distiller.train(), config, device)
    optimizer = make_optimizer(config, distiller)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the recipe's rate could make the weights diverge on random pixels
    return optimizer


def _in_precision(config: Config, device: torch.device, function: Callable[[], Any]) -> Any:
    dtype = AUTOCAST[config.train.precision]
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        return function()


def spread(values: list[float]) -> list[float]:
    """Median, least, most."""
    return [statistics.median(values), min(values), max(values)]
