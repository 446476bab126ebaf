"""Kills real runs at random points, resumes them, and compares the results with runs that were never killed.

    python benchmarks/faults.py --kills 50 --jobs 2 --out docs/results/faults

Each run is a short version of the demo (ScaleKD, ViT teacher, small CNN, embedded images): 3 epochs of 10 steps, with
mixup, averaged weights and a checkpoint after every step. It is killed (SIGKILL) five times, once each during start-up, a
step, the writing of a checkpoint, the end of an epoch, and validation. --seed determines the order and the moments. Then
it runs to its end. The last line is `K/N bit-identical, M samples or files lost`.

A run is bit-identical if these are equal: every tensor of the exported student, last.pt and best.pt (weights, methods,
optimiser, average), the history of validations, and every logged loss of every step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file

from scalekd.common.provenance import machine
from scalekd.train import checkpoint
from scalekd.train.log import read_log

STEPS, EPOCHS, BATCH = 10, 3, 20  # steps are per epoch
RECIPE = [
    *("data.val=null", "data.val_fraction=0.1", f"data.limit={STEPS * BATCH}"),
    *("augment.mixup=0.2", f"train.batch_size={BATCH}", f"train.epochs={EPOCHS}", "train.eval_every=1"),
    *("train.log_every=1", "train.save_minutes=0", "train.ema=0.9", "schedule.warmup_epochs=1"),
]
VARIANTS: dict[str, list[str]] = {
    "1 process, 0 workers": ["data.workers=0"],
    "1 process, 2 workers, 2 accumulated": ["data.workers=2", "train.accumulate=2"],
    "2 processes, 2 workers": ["data.workers=2"],
}
POINTS = ("start-up", "step", "checkpoint", "end of epoch", "validation")


def start_python(command: list[str], environment: dict[str, str], output: BinaryIO) -> subprocess.Popen[bytes]:
    """Starts `python COMMAND`, which writes to `output`. The tests replace this function."""
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=output, stderr=output, start_new_session=True
    )


def start(variant: str, folder: Path) -> subprocess.Popen[bytes]:
    command = ["-m", "scalekd", "train", "demo", *RECIPE, *VARIANTS[variant], "--out", str(folder)]
    command += ["--device", "cpu", "--no-preflight"]
    if variant.startswith("2 processes"):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder.with_suffix(".txt"), "ab") as output:
        return start_python(command, environment, output)


def to_the_end(variant: str, folder: Path) -> float:
    """Runs without kills to the end. Returns the seconds until its first step."""
    began, first = time.monotonic(), None
    child = start(variant, folder)
    while child.poll() is None:
        first = first or (time.monotonic() - began if last_step(folder) else None)
        time.sleep(0.01)
    if child.returncode:
        raise SystemExit(f"{folder}: exit code {child.returncode}\n{folder.with_suffix('.txt').read_text()[-8000:]}")
    return first or 0.0


def events(folder: Path) -> list[dict[str, Any]]:
    return read_log(folder) if (folder / "log.jsonl").is_file() else []


READ: dict[Path, tuple[int, int]] = {}  # log -> its size and last step, cached because `last_step` is called in a loop


def last_step(folder: Path) -> int:
    log = folder / "log.jsonl"
    size = log.stat().st_size if log.is_file() else 0
    if READ.get(log, (-1, 0))[0] != size:
        READ[log] = size, max((e["step"] for e in events(folder) if e["event"] == "step"), default=0)
    return READ[log][1]


def kill_at(point: str, variant: str, folder: Path, start_up: float, chance: random.Random) -> str | None:
    """Starts or resumes a run and kills it. Returns what it was doing, as its folder shows; None if it finished before."""
    before = last_step(folder)
    child = start(variant, folder)
    moment = chance.random()
    target = before + 1 + chance.randrange(4)
    epoch_end = (before // STEPS + 1) * STEPS
    began = time.monotonic()
    while child.poll() is None:
        if point == "start-up" and time.monotonic() - began > moment * start_up:
            break
        if point == "step" and last_step(folder) >= target:
            time.sleep(0.05 * moment)  # about the duration of a step
            break
        if point == "checkpoint" and last_step(folder) >= target and any(folder.glob("last.pt.*.part")):
            time.sleep(0.004 * moment)  # about the duration of writing
            break
        if point in ("end of epoch", "validation") and last_step(folder) >= epoch_end:
            time.sleep((0.01 if point == "end of epoch" else 0.8) * moment)
            break
        time.sleep(0.001)
    if child.poll() is not None:
        if child.returncode:
            raise SystemExit(
                f"{folder}: exit code {child.returncode}\n{folder.with_suffix('.txt').read_text()[-8000:]}"
            )
        return None
    for pid in [child.pid, *descendants(child.pid)]:  # all at once, as when a machine fails
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    child.wait()
    time.sleep(0.05)
    return activity(folder, before)


def descendants(pid: int) -> list[int]:
    """All child processes. Killing the process group is not enough: torchrun starts its workers in their own sessions."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    children, new = [], [pid]
    while new:
        new = [child for parent in new for child in parents.get(parent, [])]
        children += new
    return children


def activity(folder: Path, before: int) -> str:
    """What a killed run was doing, judging by its folder. before: the last step when it started."""
    if any(folder.glob("last.pt.*.part")) or any(folder.glob("best.pt.*.part")):
        return "in a checkpoint"
    step, logged = last_step(folder), events(folder)
    if step <= before and (not logged or logged[-1]["event"] in ("resumed", "step")):
        return "in start-up"
    validated = any(e["event"] == "validation" and e["step"] == step for e in logged)
    if step % STEPS == 0 and not validated:
        return "at the end of an epoch or in validation"
    return "in a step"


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """The paths of all values that differ between two nested structures."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        unmatched = [f"{path}.{k}" for k in a.keys() ^ b.keys()]
        return unmatched + [d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}[{i}]")]
    return [] if a == b else [path]


def content(folder: Path) -> dict[str, Any]:
    """Everything that must be equal."""
    values: dict[str, Any] = {name: checkpoint.load(folder / f"{name}.pt") for name in ("last", "best")}
    del values["last"]["progress"]["elapsed"]  # seconds, which always differ
    values["student"] = load_file(folder / "student.safetensors")
    values["log"] = [
        [e["step"], e.get("losses"), e.get("top1")] for e in events(folder) if e["event"] in ("step", "validation")
    ]
    return values


def lost(folder: Path, reference: Path) -> int:
    """The samples of steps that were not logged exactly once, plus the files that are missing compared with `reference`."""
    counted = Counter(e["step"] for e in events(folder) if e["event"] == "step")
    samples = BATCH * sum(counted[step] != 1 for step in range(1, STEPS * EPOCHS + 1))
    return samples + len({p.name for p in reference.iterdir()} - {p.name for p in folder.iterdir()})


def killed_run(i: int, args: argparse.Namespace, root: Path, start_up: dict[str, float]) -> dict[str, Any]:
    """Run number `i`: kills it at every point, lets it end, and compares it with its variant's reference."""
    variant = args.variants[i % len(args.variants)]
    chance = random.Random(f"{args.seed} {i}")
    points = chance.sample(POINTS, min(len(POINTS), args.kills - i * len(POINTS)))
    folder, reference = root / f"run-{i}", reference_of(variant, args, root)
    fell = [kill_at(point, variant, folder, start_up[variant], chance) for point in points]
    if None not in fell:
        to_the_end(variant, folder)
    differing = differences(content(reference), content(folder))
    result = {
        "variant": variant,
        "killed": dict(zip(points, fell)),
        "kills": sum(f is not None for f in fell),
        "differences": differing[:20],
        "lost": lost(folder, reference),
    }
    print(f"run {i}: {variant}; {result['kills']} kills; {'equal' if not differing else differing[:3]}", flush=True)
    return result


def reference_of(variant: str, args: argparse.Namespace, root: Path) -> Path:
    return root / f"reference-{args.variants.index(variant)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="determines the order and the moments of the kills")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path, help="the folder for faults.json")
    args = parser.parse_args(argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        with ThreadPoolExecutor(args.jobs) as pool:
            seconds = pool.map(lambda name: to_the_end(name, reference_of(name, args, root)), args.variants)
            start_up = dict(zip(args.variants, seconds))
            count = -(-args.kills // len(POINTS))
            runs = list(pool.map(lambda i: killed_run(i, args, root, start_up), range(count)))
    kills = sum(r["kills"] for r in runs)
    same = sum(r["kills"] for r in runs if not r["differences"])
    missing = sum(r["lost"] for r in runs)
    fell_in = Counter(f for r in runs for f in r["killed"].values() if f)
    print(", ".join(f"{n} {what}" for what, n in sorted(fell_in.items())), f"in {time.monotonic() - began:.0f} s")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        result = {
            "command": f"python benchmarks/faults.py --kills {args.kills} --seed {args.seed} --jobs {args.jobs}",
            "machine": machine(torch.device("cpu")),
            "kills": kills,
            "bit_identical": same,
            "lost": missing,
            "fell": dict(sorted(fell_in.items())),
            "seconds": round(time.monotonic() - began),
            "runs": runs,
        }
        (args.out / "faults.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{same}/{kills} bit-identical, {missing} samples or files lost")
    return 0 if same == kills == args.kills and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
