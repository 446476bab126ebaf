"""The speed part of `gpu.py`: real training steps of each form with each lever. Each function is a row."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from gpu_models import LEVERS, TINY, classes_of, pair_of, recipe, run_of
from steps import PAIRS, make_optimizer, make_step
from timm_tasks import measure as measure_timm
from torch import Tensor, nn

from scalekd.data.batches import Batch
from scalekd.distill.compiled import compile_step
from scalekd.models.inputs import default_statistics, per_channel, scaled
from scalekd.train.engine import looks_at_every_step, train_step

LONGEST = 200  # steps in a block
PROFILED = 3  # steps that the profiler looks at


def step_speed(
    device: str,
    pair: str,
    form: str,
    batch: int,
    levers: str,
    block_seconds: float,
    blocks: int = 5,
    warm: int = 3,
    backend: str | None = None,
) -> dict[str, Any]:
    """Images per second, milliseconds per step, peak memory and the share of time in which the GPU is busy.

    The device is waited for between blocks of steps only, as between two log lines.

    Args:
        block_seconds: about how long a block takes.
        blocks: timed blocks.
        warm: steps before them; the first one compiles, and the second records CUDA graphs.
        backend: of torch.compile; None for its own.
    """
    chosen = torch.device(device)
    torch.manual_seed(0)
    gc.collect()
    torch._dynamo.reset()  # compiled functions hold the models of rows before, and are compiled a few times only
    held = 0.0
    if chosen.type == "cuda":
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated(chosen)
    make = _floor if form == "floor" else _ours
    step = make(chosen, pair, form, batch, levers, {"backend": backend} if backend else {})
    began = time.perf_counter()
    step()
    _wait(chosen)
    first = time.perf_counter() - began
    for _ in range(warm - 1):
        step()
    if chosen.type == "cuda":
        torch.cuda.reset_peak_memory_stats(chosen)
    once = _timed(step, 1, chosen)
    count = max(1, min(LONGEST, math.ceil(block_seconds / once)))
    seconds = [_timed(step, count, chosen) for _ in range(blocks)]
    median = statistics.median(seconds)
    return {
        "images_per_s": batch / median,
        "ms": [1000 * value for value in (median, min(seconds), max(seconds))],
        "steps": count * blocks,
        "first_step_s": first,
        "peak_mb": (torch.cuda.max_memory_allocated(chosen) - held) / 1e6 if chosen.type == "cuda" else None,
        "busy": _busy(step, chosen),
    }


def _ours(
    chosen: torch.device, pair: str, form: str, batch: int, levers: str, how: dict[str, Any]
) -> Callable[[], Any]:
    """The engine's step on a batch in pinned memory, as a data worker leaves it."""
    run = run_of(pair, form, batch, LEVERS[levers], chosen)
    if run.config.train.compile:
        compile_step(run.distiller, batch, run.config.train.cuda_graphs, **how)
    made, checked = _batch(pair, batch, chosen), looks_at_every_step(run)
    return lambda: train_step(run.distiller, [made], run, 0, checked)


def _floor(
    chosen: torch.device, pair: str, form: str, batch: int, levers: str, how: dict[str, Any]
) -> Callable[[], Any]:
    """The least that distillation costs: the teacher's forward pass, the student's step, on plain timm models."""
    models, train = pair_of(pair), recipe(pair, form, batch, LEVERS[levers]).train
    layout = torch.channels_last if train.channels_last else torch.contiguous_format
    with chosen:
        student = timm.create_model(models.student, **models.student_kwargs)
        teacher = timm.create_model(models.teacher, **models.teacher_kwargs)
    student, teacher = (m.to(chosen, memory_format=layout) for m in (student, teacher.eval().requires_grad_(False)))
    stats = [[per_channel(values).to(chosen) for values in default_statistics(m)] for m in (student, teacher)]
    made = _batch(pair, batch, chosen)
    look: Callable[..., Tensor] = torch.compile(teacher, dynamic=False, **how) if train.compile else teacher
    learn: Callable[..., Tensor] = torch.compile(student, dynamic=False, **how) if train.compile else student

    def losses() -> Tensor:
        pixels = scaled(made.images.to(chosen, non_blocking=True)).contiguous(memory_format=layout)
        targets = made.targets.to(chosen, non_blocking=True)
        (mean, std), (their_mean, their_std) = stats
        with torch.no_grad():
            look((pixels - their_mean) / their_std)
        return nn.functional.cross_entropy(learn((pixels - mean) / std), targets)

    optimizer = make_optimizer(student.parameters(), models.optimizer)
    return make_step(student, losses, optimizer, chosen, half=train.precision != "float32")


def _batch(pair: str, batch: int, chosen: torch.device) -> Batch:
    models = pair_of(pair)
    pixels = torch.randint(256, (batch, 3, models.size, models.size), dtype=torch.uint8)
    targets = torch.randint(classes_of(models), (batch,))
    return Batch(*(t.pin_memory() if chosen.type == "cuda" else t for t in (pixels, targets)))


def _timed(step: Callable[[], Any], count: int, chosen: torch.device) -> float:
    """Seconds of a step, from `count` of them in a row."""
    _wait(chosen)
    began = time.perf_counter()
    for _ in range(count):
        step()
    _wait(chosen)
    return (time.perf_counter() - began) / count


def _wait(chosen: torch.device) -> None:
    if chosen.type == "cuda":
        torch.cuda.synchronize(chosen)


def _busy(step: Callable[[], Any], chosen: torch.device) -> float | None:
    """The share of the time in which at least one kernel or copy runs on the GPU; None on a CPU."""
    if chosen.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            step()
        _wait(chosen)
    spans = sorted(
        (e.time_range.start, e.time_range.end) for e in profile.events() or () if "cuda" in str(e.device_type).lower()
    )
    return covered(spans)


def covered(spans: list[tuple[float, float]]) -> float | None:
    """The share of the time from the first start to the last end that the spans, sorted by start, cover; None without any."""
    if not spans:
        return None
    used, end = 0.0, spans[0][0]
    for begin, finish in spans:
        used += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    return used / (end - spans[0][0]) if end > spans[0][0] else None


def timm_speed(device: str, pair: str, batch: int, rounds: int) -> dict[str, Any]:
    """`kd` and `fd` beside timm's own distillation tasks, in turns, in bf16."""
    models = TINY if pair == "tiny" else PAIRS[pair]
    if pair == "tiny":  # timm's feature task has no test models of one width
        models = models._replace(teacher="test_resnet", teacher_kwargs={"num_classes": 10})
    return measure_timm(models._replace(batch=batch), torch.device(device), rounds, half=True)
