"""Times ONNX files under onnxruntime, side by side: in turns, so that what else the machine does reaches all of them.

The order changes in every round, and each file runs once untimed before it is timed: otherwise a file that follows a
large one would find the caches full of its weights.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scalekd.models.student_file import onnx_runtime

BATCHES = (1, 16)
ROUNDS, FEWEST_ROUNDS = 200, 5
SECONDS = 10.0  # for all files together, at each batch size

Latency = dict[str, float]  # median, low and high quartile in ms; rounds


def latencies(
    files: Mapping[str, Path], *, batches: Sequence[int] = BATCHES, threads: int = 1, seconds: float = SECONDS
) -> dict[str, dict[str, Latency]]:
    """name -> batch size -> milliseconds of a batch of random images on the CPU."""
    sessions = {name: _session(file, threads) for name, file in files.items()}
    found: dict[str, dict[str, Latency]] = {name: {} for name in files}
    order, shuffle = list(files), random.Random(0).shuffle
    for size in batches:
        inputs = {name: _images(session, size) for name, session in sessions.items()}
        times: dict[str, list[float]] = {name: [] for name in files}
        began, rounds = time.perf_counter(), 0
        while rounds < FEWEST_ROUNDS or (rounds < ROUNDS and time.perf_counter() - began < seconds):
            shuffle(order)
            for name in order:
                sessions[name].run(None, inputs[name])
                start = time.perf_counter()
                sessions[name].run(None, inputs[name])
                times[name].append(1000 * (time.perf_counter() - start))
            rounds += 1
        for name, values in times.items():
            found[name][str(size)] = summary(values)
    return found


def summary(milliseconds: Sequence[float]) -> Latency:
    low, median, high = statistics.quantiles(milliseconds, n=4)
    return {"median": median, "low": low, "high": high, "rounds": len(milliseconds)}


def _session(file: Path, threads: int) -> Any:
    runtime = onnx_runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _images(session: Any, size: int) -> dict[str, Any]:
    given = session.get_inputs()[0]
    kind = np.float16 if given.type == "tensor(float16)" else np.float32
    return {given.name: np.random.default_rng(0).standard_normal((size, *given.shape[1:])).astype(kind)}
