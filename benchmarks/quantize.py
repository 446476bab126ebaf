"""Quantises students of the demo's data in every way, with several seeds: accuracy, size, latency.

python benchmarks/quantize.py --seeds 5 --out docs/results/quantize --runs runs/quantize

Students: `demo`, the demo's CNN with its recipe; `mobilenetv3` and `vit`, a MobileNetV3 and a ViT-tiny with CE and KD.
Each is trained, calibrated, and trained in int8 with labels only and with the teacher. What a run gave is kept in
OUT/runs, and the table is written after every run. The same command continues where it was stopped; `--finished` trains
nothing and writes the table of what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

import scalekd

PLAIN = ["losses.scalekd=off", "student.mean=[0.286]", "student.std=[0.353]"]
STUDENTS = {
    "demo": [],
    "mobilenetv3": ["student.model=mobilenetv3_small_100", "student.kwargs={}", *PLAIN],
    "vit": ["student.model=vit_tiny_patch16_224", "student.kwargs={patch_size: 7}", "optim.lr=1e-3", *PLAIN],
}
WAYS = {"ptq": "calibrated", "qat-labels": "trained with labels only", "qat": "trained with the teacher"}


def finished(out: Path, student: str, seed: int) -> Path:
    """The file of what a run gave; it is there once the run is finished."""
    return out / "runs" / f"{student}-seed{seed}.json"


def result_of(student: str, seed: int, runs: Path, out: Path, epochs: int) -> dict[str, Any]:
    """Trains and quantises a student with a seed, or reads what an earlier start finished."""
    known = finished(out, student, seed)
    if known.is_file():
        return json.loads(known.read_text())
    run = runs / f"{student}-seed{seed}"
    if not (run / "summary.json").is_file():
        overrides = [] if student == "demo" else [f"name=demo-{student}"]
        scalekd.train(
            "demo", out=run, seed=seed, overrides=[*overrides, *STUDENTS[student]], verbose=True, device="cpu"
        )
    found = scalekd.quantize(run, qat=True, qat_labels=True, epochs=epochs, verbose=True, device="cpu")
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(found.details) + "\n")
    return found.details


def paired(values: list[float]) -> dict[str, Any]:
    """Mean of differences over seeds and the half width of its 95 % interval by Student's t; None for one seed."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    half = None if spread is None else float(student_t.ppf(0.975, len(values) - 1)) * spread
    return {"mean": statistics.mean(values), "half_width": half, "values": values}


def summary(results: dict[str, dict[int, dict[str, Any]]], epochs: int) -> dict[str, Any]:
    students: dict[str, Any] = {}
    for student, by_seed in results.items():
        rows = [details["rows"] for details in by_seed.values()]
        top1 = {name: [row[name]["top1"] for row in rows] for name in rows[0]}
        students[student] = {
            "seeds": list(by_seed),
            "machines": sorted({details["machine"] for details in by_seed.values()}),
            "top1": top1,
            "change_from_float32": {way: paired([a - b for a, b in zip(top1[way], top1["float32"])]) for way in WAYS},
            "change_interval_by_image": {way: [row[way]["change_interval"] for row in rows] for way in WAYS},
            "teacher_minus_labels": paired([a - b for a, b in zip(top1["qat"], top1["qat-labels"])]),
            "agreement": {way: [row[way]["agreement"] for row in rows] for way in WAYS},
            "bytes": {name: rows[0][name]["bytes"] for name in rows[0]},
            "latency_ms": {name: [row[name]["latency_ms"] for row in rows] for name in rows[0]},
            "file_beside_training": {way: [row[way]["trained"] for row in rows] for way in ("qat-labels", "qat")},
            "teachers": [details["teachers"] for details in by_seed.values()],
            "left_in_float": next(iter(by_seed.values()))["left_in_float"],
            "calibration": [details["calibration"]["method"] for details in by_seed.values()],
        }
    first = next(iter(next(iter(results.values())).values()))
    seeds = max(len(by_seed) for by_seed in results.values())
    how = {key: first[key] for key in ("versions", "latency_of")}
    command = f"python benchmarks/quantize.py --seeds {seeds} --students {','.join(results)}"
    return {"command": command, "epochs": epochs, **how, "students": students}


def markdown(found: dict[str, Any]) -> str:
    lines = ["| student | file | top-1 % | change | same class % | MB | ms, 1 image | ms, 16 images |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for name, of in found["students"].items():
        for row, values in of["top1"].items():
            change = _change(of["change_from_float32"][row]) if row in WAYS else ""
            if change and len(values) == 1:
                change += f" ± {of['change_interval_by_image'][row][0]:.2f}"
            same = f"{statistics.mean(of['agreement'][row]):.2f}" if row in WAYS else ""
            lines.append(
                f"| {name} | {WAYS.get(row, row)} | {_spread(values)} | {change} | {same} | {of['bytes'][row] / 1e6:.2f} | "
                f"{_latency(of['latency_ms'][row], '1')} | {_latency(of['latency_ms'][row], '16')} |"
            )
        for key, teacher in of["teachers"][0].items():
            times = [entry[key]["latency_ms"] for entry in of["teachers"]]
            label = f"| {name} | {key}, {teacher['model']} | | | | {teacher['bytes'] / 1e6:.2f} |"
            lines.append(f"{label} {_latency(times, '1')} | {_latency(times, '16')} |")
    told = [
        f"{name}, teacher minus labels: {_change(of['teacher_minus_labels'])}" for name, of in found["students"].items()
    ]
    seeds = ", ".join(f"{name} {len(of['seeds'])}" for name, of in found["students"].items())
    machines = "; ".join(f"{name}: {', '.join(of['machines'])}" for name, of in found["students"].items())
    over = "seeds; for one seed over validation images"
    end = f"± of top-1: standard deviation over seeds; of changes: 95 % interval, paired, over {over}. Seeds: {seeds}. {'; '.join(told)}. Machines: {machines}. Command: `{found['command']}`."
    return "\n".join([*lines, "", end]) + "\n"


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _change(of: dict[str, Any]) -> str:
    return f"{of['mean']:+.2f}" + (f" ± {of['half_width']:.2f}" if of["half_width"] is not None else "")


def _latency(times: list[dict[str, Any]], size: str) -> str:
    return f"{statistics.median(entry[size]['median'] for entry in times):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--students", default=",".join(STUDENTS), help="comma-separated")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="of each training in int8")
    parser.add_argument("--runs", type=Path, default=Path("runs/quantize"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/quantize"))
    parser.add_argument("--finished", action="store_true", help="only write the table of the finished runs")
    args = parser.parse_args()
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for seed in range(args.seeds):
        for student in args.students.split(","):
            if args.finished and not finished(args.out, student, seed).is_file():
                continue
            results.setdefault(student, {})[seed] = result_of(student, seed, args.runs, args.out, args.epochs)
            found = summary(results, args.epochs)
            (args.out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
            (args.out / "summary.md").write_text(markdown(found))


if __name__ == "__main__":
    main()
