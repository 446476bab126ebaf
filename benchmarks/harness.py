"""Shared by the benchmarks: timing functions in turns, the memory of a step, and results as JSON and tables.

On a CPU with one thread, times are CPU seconds (`time.process_time`), which other programs on the machine disturb less
than wall-clock time. Otherwise they are wall-clock seconds, with synchronisation on a GPU.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from scalekd.common.malloc import keep_freed_memory
from scalekd.common.provenance import machine

Quartiles = list[float]  # lower quartile, median, upper quartile


def parser(text: str, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks here share."""
    made = argparse.ArgumentParser(description=text.splitlines()[0])
    made.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    made.add_argument("--threads", type=int, default=1, help="threads of PyTorch on a CPU (default: 1)")
    made.add_argument("--rounds", type=int, default=rounds, help="timed calls of each function (default: %(default)s)")
    made.add_argument("--out", type=Path, metavar="DIR", help="a folder for NAME.json and NAME.md")
    return made


def prepare(args: argparse.Namespace) -> torch.device:
    """Sets threads, seed and memory as a run does."""
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if device.type == "cpu":
        keep_freed_memory()
    return device


# ---------------------------------------------------------------- time


def in_turns(
    functions: dict[str, Callable[[], object]], device: torch.device, rounds: int, warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call. A round calls each function once, starting with a different one each time."""
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-warm, rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            taken = _seconds(functions[name], device)
            if i >= 0:
                seconds[name].append(taken)
    return seconds


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    function()
    return clock() - began


def quartiles(values: Sequence[float]) -> Quartiles:
    return statistics.quantiles(values, n=4, method="inclusive")


def ratio(of: Sequence[float], to: Sequence[float]) -> Quartiles:
    """Quartiles of the ratios, taken round by round."""
    return quartiles([a / b for a, b in zip(of, to, strict=True)])


# ---------------------------------------------------------------- memory


def memory_mb(
    step: Callable[[], object],
    trained: Sequence[Tensor],
    frozen: Iterable[Tensor],
    state: Callable[[], Iterable[Tensor]],
    device: torch.device,
) -> dict[str, float]:
    """Memory of a step that has run before, in MB of 10^6 bytes: `weights`, `gradients`, `optimizer`, `activations`.

    trained, frozen: parameters and buffers; the trained parameters have no gradient before and after the step.
    state: the optimiser's tensors. `activations` on a CPU: what autograd saves for the backward pass, each storage
    once, without memory that lives only within or between operations. On a GPU: the allocator's peak during the step,
    less what was allocated before it and less the gradients.
    """
    held = [*trained, *frozen]
    known = {t.untyped_storage().data_ptr() for t in held}
    saved: dict[int, torch.UntypedStorage] = {}  # kept until the step ends, since addresses are reused

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved.setdefault(storage.data_ptr(), storage)
        return tensor

    gradients = sum(_bytes(t) for t in trained if t.requires_grad)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        activations = torch.cuda.max_memory_allocated(device) - before - gradients
    else:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            step()
        activations = sum(storage.nbytes() for storage in saved.values())
    parts = {
        "weights": sum(map(_bytes, held)),
        "gradients": gradients,
        "optimizer": sum(map(_bytes, state())),
        "activations": activations,
    }
    return {name: count / 1e6 for name, count in parts.items()} | {"total": sum(parts.values()) / 1e6}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# ---------------------------------------------------------------- results


def about(device: torch.device) -> dict[str, Any]:
    """Command, machine and versions, for the head of a result."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(device),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first column holds names, the others numbers."""
    head = [f"| {' | '.join(columns)} |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    return head + [f"| {' | '.join(row)} |" for row in rows]


def median_text(values: Quartiles, digits: int = 2) -> str:
    """The median, with the quartiles in brackets."""
    low, middle, high = (f"{v:.{digits}f}" for v in values)
    return f"{middle} ({low} to {high})"


def write(out: Path | None, name: str, found: dict[str, Any], lines: Sequence[str]) -> None:
    """Prints the lines. With `out`, also writes them to NAME.md and `found` to NAME.json."""
    print("\n".join(lines))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
        (out / f"{name}.md").write_text("\n".join(lines) + "\n")
