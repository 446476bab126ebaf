"""Compares `scalekd plan --measure` with real runs on this machine.

    python benchmarks/plan_check.py --out docs/results/plan

The command line predicts and makes each run, in separate processes one after the other, on the embedded Fashion-MNIST
images. Compared are the seconds of training and validation (from the run's summary.json) and the peak memory of the
training process. `no-teacher`, `convnext-dfm-64px` and `two-readers-augmented` were tried, at another size, before the
width of the intervals was chosen; the other runs were not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from scalekd.common.provenance import machine
from scalekd.common.text import printable
from scalekd.cost.plan_page import between

VIT = "{model: vit_tiny_patch16_224, weights: random, kwargs: {patch_size: 4, embed_dim: 96, depth: 6, num_heads: 3}}"
# name: overrides of the recipe `demo` (a small ViT and a small ResNet, ScaleKD, images of 28 pixels)
RUNS: dict[str, list[str]] = {
    "demo": [],
    "demo-kd": ["losses.scalekd=off"],
    "no-teacher": ["teacher=null", "losses={ce: {}}"],
    "vit-fd": [
        "student={model: vit_tiny_patch16_224, kwargs: {patch_size: 4, embed_dim: 64, depth: 4, num_heads: 2}}",
        f"teacher={VIT}",
        "losses={ce: {}, fd: {}}",
    ],
    "mobilenet-kd-56px": [
        "student={model: mobilenetv3_small_050}",
        "data.image_size=56",
        "teacher.image_size=28",
        "losses={ce: {}, kd: {}}",
        "train.batch_size=32",
    ],
    "convnext-dfm-64px": [
        "student={model: convnext_atto, kwargs: {depths: [1, 1, 2, 1], dims: [16, 32, 64, 96]}}",
        "teacher={model: swin_tiny_patch4_window7_224, weights: random, kwargs: {window_size: 4, embed_dim: 24, depths: [1, 1, 2, 1]}}",
        "data.image_size=64",
        "losses={ce: {}, dfm: {}}",
        "train.ema=0.99",
    ],
    "resnet18-alone-40px": ["student={model: resnet18}", "data.image_size=40", "teacher=null", "losses={ce: {}}"],
    "resnet18-scalekd-64px": [
        "student={model: resnet18}",
        "data.image_size=64",
        "teacher.image_size=28",
        "losses={ce: {}, scalekd: {heads: [3, 3], shared: false, expansion: 4}}",
        "train.accumulate=2",
    ],
    "two-readers-augmented": [
        "data.workers=2",
        "augment={crop: random_resized, auto_augment: rand-m7-mstd0.5, mixup: 0.2, erase: 0.25}",
        "losses={ce: {}, kd: {}}",
    ],
}


def scalekd(*words: str) -> tuple[str, float, float]:
    """Runs a command. Returns its output, its seconds, and the peak memory of its process in GB."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "scalekd", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"scalekd {' '.join(words)}:\n{output}")
    return output, time.perf_counter() - began, used.ru_maxrss * 1024 / 1e6 / 1e3


def check(name: str, epochs: int, limit: int, work: Path) -> dict[str, Any]:
    overrides = [f"name={name}", f"train.epochs={epochs}", f"data.limit={limit}", "track=[]", *RUNS[name]]
    overrides += [f"schedule.warmup_epochs={min(1, epochs - 1)}", f"train.eval_every={max(1, epochs // 2)}"]
    output, planning, _ = scalekd("plan", "demo", *overrides, "--measure", "--device", "cpu", "--json")
    planned = json.loads(output)
    (run,) = planned["runs"]
    _, wall, peak = scalekd("train", "demo", *overrides, "--no-preflight", "--device", "cpu", "--out", str(work / name))
    seconds = json.loads((work / name / "summary.json").read_text())["seconds"]
    low, high = (3600 * hours for hours in planned["hours"])
    return {
        "run": name,
        "overrides": overrides,
        "predicted_seconds": [low, high],
        "seconds": seconds,
        "within": low <= seconds <= high,
        "whole_command_seconds": wall,
        "planning_seconds": planning,
        "predicted_gb": [mb / 1e3 for mb in run["memory_mb"]],
        "gb": peak,
        "plan": run,
    }


def page(found: dict[str, Any]) -> str:
    lines = ["# Plans against runs", "", f"`{found['command']}`", "", f"On {printable(found['machine'])}.", ""]
    lines += [
        "| run | predicted, s | took, s | within | the whole command, s | predicted, GB | held, GB | planning, s |"
    ]
    lines += ["|---|---|--:|---|--:|---|--:|--:|"]
    for run in found["runs"]:
        cells = [
            run["run"],
            between(*run["predicted_seconds"]),
            f"{run['seconds']:.1f}",
            "yes" if run["within"] else "NO",
        ]
        cells += [f"{run['whole_command_seconds']:.0f}", between(*run["predicted_gb"]), f"{run['gb']:.2f}"]
        cells.append(f"{run['planning_seconds']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    within = sum(run["within"] for run in found["runs"])
    lines += ["", f"{within} of {len(found['runs'])} took a time within the predicted interval."]
    lines += ["Seconds are of training and validation; the whole command also loads, builds, exports and reports."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/plan-check"), help="folder for the runs; must not exist"
    )
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=RUNS, metavar="RUN", help=", ".join(RUNS))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--limit", type=int, default=1000, help="training images")
    args = parser.parse_args()
    runs = [check(name, args.epochs, args.limit, args.work) for name in args.only]
    words = f" --epochs {args.epochs} --limit {args.limit}" if (args.epochs, args.limit) != (4, 1000) else ""
    command = f"python benchmarks/plan_check.py --out {args.out}{words}"
    found = {"command": command, "machine": machine(torch.device("cpu")), "runs": runs}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "plan_check.json").write_text(json.dumps(found, indent=2) + "\n")
    (args.out / "plan_check.md").write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()
