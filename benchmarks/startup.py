"""Measures CPU time of `scalekd --help`, and what `scalekd train` adds to imports and models before the first step.

    python benchmarks/startup.py --out docs/results/performance

For the second, the recipe `demo` runs without pre-flight until the first call of `train_step`. The time of its imports,
of building its models and of reading their weights, measured in the same process, is subtracted.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import about, median_text, quartiles, table, write

# runs in its own process; prints {"imports": s, "models": s, "before the first step": s}, in CPU time
PROBE = """
import json, sys, time
from pathlib import Path
from scalekd.cli import app
from scalekd.distill import build
from scalekd.runs import distillation
from scalekd.train import engine
imports = time.process_time()
models = 0.0
make = build.build_model
def timed(*args, **kwargs):
    global models
    began = time.process_time()
    try:
        return make(*args, **kwargs)
    finally:
        models += time.process_time() - began
def first_step(*args, **kwargs):
    print(json.dumps({"imports": imports, "models": models, "all": time.process_time()}), flush=True)
    raise SystemExit
build.build_model, engine.train_step = timed, first_step
app.main(["train", "demo", "--no-preflight", "--out", sys.argv[1], "--device", "cpu"])
"""


def help_seconds() -> float:
    """CPU seconds in user mode."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-m", "scalekd", "--help"], check=True, stdout=subprocess.DEVNULL)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def first_step() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", PROBE, str(Path(folder) / "run")]
        done = subprocess.run(command, capture_output=True, text=True)
    told_lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not told_lines:
        raise SystemExit(f"the run did not reach its first step:\n{done.stdout}{done.stderr}")
    return json.loads(told_lines[0])


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--out", type=Path, metavar="DIR")
    args = made.parse_args()
    torch.set_num_threads(1)
    helps = [help_seconds() for _ in range(args.rounds)]
    starts = [first_step() for _ in range(args.rounds)]
    seconds: dict[str, Any] = {
        "scalekd --help": quartiles(helps),
        "scalekd train: imports": quartiles([s["imports"] for s in starts]),
        "scalekd train: models and weights": quartiles([s["models"] for s in starts]),
        "scalekd train: all else before the first step": quartiles(
            [s["all"] - s["imports"] - s["models"] for s in starts]
        ),
    }
    found = about(torch.device("cpu")) | {"rounds": args.rounds, "seconds": seconds}
    rows = [[name, median_text(v)] for name, v in seconds.items()]
    foot = f"{found['machine']}; {args.rounds} rounds; medians (quartiles) of the processor's seconds."
    write(args.out, "startup", found, [*table(["what", "seconds"], rows), "", foot])


if __name__ == "__main__":
    main()
