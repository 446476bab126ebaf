"""The measured part of `scalekd plan`: times a recipe's steps on random pixels and the loading of its images."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from scalekd.common.malloc import keep_freed_memory
from scalekd.common.out_of_memory import explain_out_of_memory
from scalekd.common.provenance import machine
from scalekd.config.recipe import Config
from scalekd.data.batches import Batch, Images, load_batch, train_batches, training_images, validation_images
from scalekd.data.samplers import TrainSampler
from scalekd.data.split import Split
from scalekd.data.transforms import make_mixup
from scalekd.distill.build import untrained
from scalekd.distill.compiled import compile_step
from scalekd.distill.distiller import Distiller
from scalekd.distill.run import DistillationRun
from scalekd.train.engine import looks_at_every_step, train_step
from scalekd.train.hardware import workers_of
from scalekd.train.optim import make_schedule
from scalekd.train.run import scaler_and_average

from .seconds import ROUNDS, ready_for_steps, spread

MOST = 64  # images of a timed step by default, at most
ROUND_SECONDS = 1.0  # at least: shorter rounds of a small model depend on the scheduler
WARM, MOST_READ = 8, 400  # images loaded before the rounds, and at most in one


def probe(
    config: Config,
    device: torch.device,
    classes: int,
    micro: int,
    batch: int | None,
    split: Split | None,
    together: bool = False,
) -> dict[str, Any]:
    """Seconds per image, [least, most] of ROUNDS: `train`, `validate`, and with data `read` and `read_validation`.

    together: with data, also `together`, those of steps on images that the recipe's workers load meanwhile.

    Times whole training steps at two batch sizes, with initial weights and a learning rate of 0. micro: the run's images
    per step and device. batch: the larger batch size; by default `micro`, at most MOST. `rounds` has the seconds per step
    or validation batch, [median, least, most]. Raises `UserError`, also if the memory does not suffice.
    """
    large = max(4, batch or min(micro, MOST))
    large -= large % 2
    small = large // 2 + large // 2 % 2  # even, for mixup
    rounds: dict[str, list[float]] = {}
    peaks: dict[int, float] = {}
    if device.type == "cpu":
        keep_freed_memory()  # as in a run
    with explain_out_of_memory(device, f"Try a smaller `batch` (now {large})."):
        run = untrained_run(config, device, classes, config.losses)
        for size in (small, large):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            rounds[f"train {size}"] = _rounds(_step(run, classes, size), device)
            peaks[size] = _peak_mb(device)
        many = min(256, 4 * large)
        rounds[f"validate {many}"] = _rounds(_validation(run.distiller, config, device, many), device)
    result = {
        "machine": machine(device),
        "cores": os.cpu_count() or 1,
        "batches": [small, large],
        "rounds": rounds,
        "train": seconds_per_image(rounds[f"train {small}"], rounds[f"train {large}"], small, large, micro),
        "validate": [seconds / many for seconds in rounds[f"validate {many}"][1:]],
        "memory": _memory(peaks, small, large, device),
    }
    if split is not None:
        train, val = _images(config, run.distiller, split)
        result |= {"read": _read(train), "read_validation": _read(val)}
        if together:
            result["together"] = _together(run, train, min(micro, len(train)))
    return result


def seconds_per_image(at_small: list[float], at_large: list[float], small: int, large: int, micro: int) -> list[float]:
    """Seconds per image, [least, most], at batch size `micro`, from the seconds per step at batch sizes small and large.

    at_small, at_large: [median, least, most]. The interval holds the measured values at `large` and the value at `micro`
    of the line through both medians.
    """
    slope = (at_large[0] - at_small[0]) / (large - small)
    on_the_line = (at_large[0] + slope * (micro - large)) / micro
    measured = [at_large[1] / large, at_large[2] / large]
    return measured if on_the_line <= 0 else [min(measured[0], on_the_line), max(measured[1], on_the_line)]


def untrained_run(config: Config, device: torch.device, classes: int, losses: Mapping[str, Any]) -> DistillationRun:
    """An untrained run without images, complete enough for `train_step`. losses: as for `Distiller`."""
    distiller = untrained(config, classes, losses)
    optimizer = ready_for_steps(distiller, config, device)
    return DistillationRun(
        config=config,
        device=device,
        classes=[],
        train_images=cast(Images, None),
        val_images=cast(Images, None),
        model=distiller,
        loaded={},
        optimizer=optimizer,
        schedule=make_schedule(config, optimizer, 1),
        mixup=make_mixup(config.augment, classes),
        steps_per_epoch=1,
        **scaler_and_average(config.train, distiller.student, device),
    )


def _step(run: DistillationRun, classes: int, size: int) -> Callable[[], object]:
    distiller, channels = run.distiller, run.config.data.channels
    sides = map(max, distiller.image_size, distiller.teacher_size)
    pixels = torch.randint(256, (size, channels, *sides), dtype=torch.uint8)
    batch = Batch(pixels, torch.randint(classes, (size,)))
    checked = looks_at_every_step(run)
    if run.config.train.compile:
        compile_step(distiller, size, run.config.train.cuda_graphs)
    return lambda: train_step(distiller, [batch], run, 0, checked)


def _validation(distiller: Distiller, config: Config, device: torch.device, size: int) -> Callable[[], object]:
    pixels = torch.rand(size, config.data.channels, *distiller.image_size, device=device)
    student = distiller.student.eval()

    def step() -> None:
        with torch.inference_mode():
            student((pixels - distiller.student_mean) / distiller.student_std)

    return step


def _rounds(step: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds per call, [median, least, most] of ROUNDS, after two calls for warming up."""
    step()
    times = max(1, math.ceil(ROUND_SECONDS / _seconds(step, 1, device)))
    return spread([_seconds(step, times, device) for _ in range(ROUNDS)])


def _seconds(step: Callable[[], object], times: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / times


def _peak_mb(device: torch.device) -> float:
    """Peak memory in MB: of the tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _memory(peaks: dict[int, float], small: int, large: int, device: torch.device) -> dict[str, float | None]:
    """`fixed_mb` and `image_mb`: memory by batch size, a line through two sizes; on a CPU only the process's peak."""
    if device.type == "cpu":
        return {"fixed_mb": peaks[large], "image_mb": 0.0, "gpu_mb": None}
    slope = (peaks[large] - peaks[small]) / (large - small)
    total = torch.cuda.get_device_properties(device).total_memory / 1e6
    return {"fixed_mb": peaks[large] - large * slope, "image_mb": slope, "gpu_mb": total}


def _images(config: Config, distiller: Distiller, split: Split) -> tuple[Images, Images]:
    """The training and validation images, with the recipe's transforms."""
    size = tuple(map(max, distiller.image_size, distiller.teacher_size))
    data = config.data.model_copy(update={"image_size": size})
    mean, std = (tuple(values.flatten().tolist()) for values in (distiller.student_mean, distiller.student_std))
    train = training_images(split, data, config.augment, mean, std, config.seed)
    return train, validation_images(split, config.data, config.augment)


def _together(run: DistillationRun, images: Images, micro: int) -> list[float]:
    """Seconds per image, [least, most] of ROUNDS, of training steps whose images the run's workers load meanwhile."""
    workers, checked = workers_of(run.config), looks_at_every_step(run)
    run.distiller.train()
    # after the batches that workers load ahead, which the first steps do not wait for
    ahead = 2 * workers + 2
    sampler = TrainSampler(len(images), micro, run.config.seed, total_steps=10**9)
    pin = run.device.type == "cuda"
    with contextlib.closing(train_batches(images, sampler, workers, pin)) as batches:

        def step() -> None:
            train_step(run.distiller, [next(batches)], run, 0, checked)

        times = max(1, math.ceil(ROUND_SECONDS / _seconds(step, ahead, run.device)))
        rounds = spread([_seconds(step, times, run.device) for _ in range(ROUNDS)])
    return [seconds / micro for seconds in rounds[1:]]


def _read(images: Images) -> list[float]:
    """Seconds per image, [least, most] of ROUNDS, after a warm-up. Rounds have different images, spread over the source."""
    warm = _seconds_an_image(images, 0, min(WARM, len(images)))
    count = max(1, min(MOST_READ, math.ceil(ROUND_SECONDS / warm), len(images) // ROUNDS))
    seconds = [_seconds_an_image(images, start, count) for start in range(ROUNDS)]
    return [min(seconds), max(seconds)]


def _seconds_an_image(images: Images, start: int, count: int) -> float:
    keys = [(0, (start + ROUNDS * i) * len(images) // (ROUNDS * count)) for i in range(count)]
    began = time.perf_counter()
    load_batch(images, keys)
    return (time.perf_counter() - began) / count
