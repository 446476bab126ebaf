"""Measures three costs of running on a CPU that docs/log.md describes, each against its alternative.

    python benchmarks/cpu_costs.py --out docs/results/cpu-costs.json

- Seeding: `torch.manual_seed` against seeding the CPU generator alone.
- Memory: page faults and CPU seconds of a training step before and after `scalekd.common.malloc.keep_freed_memory`.
- Precision: images per second of a ViT in float32 and under bf16 autocast.

One thread; medians of several alternating rounds.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

from scalekd.common.malloc import keep_freed_memory
from scalekd.common.provenance import machine

BATCH, ROUNDS = 128, 7


def seconds(function: Callable[[], object], times: int = 1) -> float:
    began = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - began) / times


def step_of(precision: torch.dtype | None) -> Callable[[], None]:
    """One training step of the demo's teacher."""
    model = timm.create_model(
        "vit_tiny_r_s16_p8_224",
        in_chans=1,
        img_size=28,
        patch_size=1,
        embed_dim=96,
        depth=6,
        num_heads=3,
        num_classes=10,
    )
    optimizer = torch.optim.AdamW(model.parameters())
    images, targets = torch.rand(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))

    def step() -> None:
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            loss = torch.nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def faults_and_cpu(step: Callable[[], None]) -> tuple[int, float]:
    before = resource.getrusage(resource.RUSAGE_SELF)
    step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_minflt - before.ru_minflt, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ways = {"torch.manual_seed": torch.manual_seed, "CPU generator alone": torch.default_generator.manual_seed}
    seeding = {name: [seconds(lambda f=f: f(1), 200) * 1e6 for _ in range(ROUNDS)] for name, f in ways.items()}

    steps = {"float32": step_of(None), "bf16": step_of(torch.bfloat16)}
    for step in steps.values():
        step()
    memory = {"as glibc has it": [faults_and_cpu(steps["float32"]) for _ in range(ROUNDS)]}
    keep_freed_memory()
    steps["float32"]()
    memory["freed memory kept"] = [faults_and_cpu(steps["float32"]) for _ in range(ROUNDS)]
    speed = {name: [BATCH / seconds(step) for _ in range(ROUNDS)] for name, step in steps.items()}
    made = {
        "command": "python benchmarks/cpu_costs.py",
        "machine": machine(torch.device("cpu")),
        "seeding_microseconds": {n: round(statistics.median(v), 2) for n, v in seeding.items()},
        "page_faults_a_step": {n: statistics.median(f for f, _ in v) for n, v in memory.items()},
        "cpu_seconds_a_step": {n: round(statistics.median(s for _, s in v), 4) for n, v in memory.items()},
        "images_per_second": {n: round(statistics.median(v), 1) for n, v in speed.items()},
    }
    print(json.dumps(made, indent=2))
    if args.out:
        args.out.write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
