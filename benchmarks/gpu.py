"""Proves on a GPU that training is correct there, and measures what each lever of speed and memory is worth.

    python benchmarks/gpu.py --minutes 8 --out runs/gpu.jsonl                # all parts, the most important rows first
    python benchmarks/gpu.py --minutes 5 --out runs/gpu.jsonl --missing      # what the first run did not get to
    python benchmarks/gpu.py --device cpu --tiny --out runs/tiny.jsonl       # every part, small, without a GPU
    python benchmarks/gpu_table.py runs/gpu.jsonl                            # the tables in docs/results/gpu

Each row runs in a process of its own with a time limit, and is appended to the file as soon as it is there. A row that
fails, hangs or crashes holds its error, and the next one runs. So a run that is cut off counts up to there. Needs
PyTorch with CUDA, timm and scalekd, no data and no network.

Parts: `checks` (correctness: gpu_checks.py), `speed` (gpu_speed.py), `input` (gpu_input.py), `timm` (timm's own tasks).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpu_models import FORMS, LEVERS, ORDER
from row_worker import Worker

PARTS = ("checks", "speed", "input", "timm")
COMPILED = 150.0  # seconds at most for a row that compiles; a compiler may take minutes for a large teacher
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # for torch.use_deterministic_algorithms, in the checks only
EAGER_LEVERS = ("teacher", "streams", "teacher+streams", "contiguous", "checkpointing", "float32", "tf32")
AGREEING = ["streams", "teacher+streams", "checkpointing", "compile", "streams+compile", "graphs", "teacher+graphs"]
OF_FORM = {  # levers of forms that are not for training; the floor's teacher is plain, and has the student's precision
    "floor": ("plain", "contiguous", "float32", "tf32", "compile"),
    "literal": ("plain", "contiguous", "float32", "tf32", "compile"),
}
WORKERS = (16, 8, 4, 2, 1)
BLOCK_SECONDS = 0.25
SHORT = {"block_seconds": 0.0, "blocks": 2, "warm": 1}


class Row(NamedTuple):
    part: str
    name: str
    function: str  # MODULE.NAME
    options: dict[str, Any]
    limit: float  # seconds


# ---------------------------------------------------------------- the rows


def rows(tiny: bool) -> list[Row]:
    """All rows, in the order in which they are worth having."""
    return list({(row.part, row.name): row for row in _rows(tiny)}.values())


def _rows(tiny: bool) -> Iterator[Row]:
    yield from _checks(tiny)
    if tiny:
        yield from _tiny()
        return
    yield from _speed("swin-s-resnet50", 128, FORMS, "plain")
    yield from (_step("swin-s-resnet50", "default", 128, levers) for levers in EAGER_LEVERS)
    yield from (_step("swin-s-resnet50", "kd", 128, levers) for levers in ("teacher", "streams", "teacher+streams"))
    yield from _speed("swin-l-vit-s", 128, FORMS, "plain")
    yield from (_step("swin-l-vit-s", "default", 128, levers) for levers in ("teacher", "streams", "teacher+streams"))
    yield _step("swin-s-resnet50", "default", 128, "compile")
    yield from (_loading(recipe, 16) for recipe in ("crop, flip", "crop, flip, RandAugment, erase"))
    yield from (_waiting(form) for form in ("kd", "default"))
    yield from (_step("swin-s-resnet50", "default", 128, levers) for levers in ("graphs", "teacher+compile"))
    yield from (_step("swin-s-resnet50", form, 128, "compile") for form in ("published", "floor", "kd"))
    for pair in ORDER[2:]:
        yield from _speed(pair, 128, FORMS, "plain")
        yield from (_step(pair, "default", 128, levers) for levers in ("teacher", "streams"))
    yield Row(
        "timm", "swin-s-resnet50 64", "gpu_speed.timm_speed", {"pair": "swin-s-resnet50", "batch": 64, "rounds": 5}, 60
    )
    for pair in ORDER:
        yield from _speed(pair, 64, FORMS, "plain")
    yield from (_step("swin-s-resnet50", "kd", 64, levers) for levers in ("compile", "graphs", "teacher+graphs"))
    yield from (_loading(recipe, n) for n in WORKERS[1:] for recipe in ("crop, flip", "crop, flip, RandAugment, erase"))
    for pair in ORDER[1:]:
        yield from (_step(pair, "default", 128, levers) for levers in ("compile", "graphs", "streams+compile"))
        yield from (_step(pair, form, 128, "compile") for form in ("published", "floor", "kd"))
    for batch in (128, 64):  # every other combination: hours, for `--missing` on a GPU of one's own
        for pair in ORDER:
            for form in FORMS:
                yield from (_step(pair, form, batch, levers) for levers in OF_FORM.get(form, LEVERS))


def _checks(tiny: bool) -> Iterator[Row]:
    def check(name: str, function: str, limit: float = 45, **options: Any) -> Row:
        return Row("checks", name, f"gpu_checks.{function}", options, limit)

    pair, batch = ("tiny", 8) if tiny else ("swin-s-resnet50", 16)
    yield check("environment", "environment")
    drawing = ["kd", "scalekd", "crd", "mgd", "diffkd"]  # the last three draw random numbers
    yield check("float32, every method", "float32_methods", methods=drawing if tiny else None)
    yield check(f"float32, {pair}", "float32_pair", pair=pair, form="default")
    yield check("bf16", "half_precision", precision="bf16")
    yield check("fp16, with an overflow", "half_precision", precision="fp16")
    yield check("resumed, deterministic", "resume", deterministic=True)
    if not tiny:
        yield check("resumed", "resume", deterministic=False)
    yield check("one process with NCCL", "one_process")
    yield check("export", "export")
    yield check("out of memory", "out_of_memory")
    for levers in ("teacher+streams", "checkpointing") if tiny else AGREEING:
        limit = COMPILED if "compile" in levers or "graphs" in levers else 45
        small = "tiny" if limit == COMPILED else pair  # the compiler takes long for a large model
        yield check(f"{levers}, {small}", "levers_agree", limit, pair=small, batch=batch, levers=[levers])


def _step(pair: str, form: str, batch: int, levers: str, **more: Any) -> Row:
    options = {"pair": pair, "form": form, "batch": batch, "levers": levers, "block_seconds": BLOCK_SECONDS} | more
    limit = COMPILED if "compile" in levers or "graphs" in levers else 40
    return Row("speed", f"{pair} {form} {batch} {levers}", "gpu_speed.step_speed", options, limit)


def _speed(pair: str, batch: int, forms: list[str], levers: str) -> Iterator[Row]:
    yield from (_step(pair, form, batch, levers) for form in forms)


def _loading(recipe: str, workers: int, **more: Any) -> Row:
    options = {"recipe": recipe, "workers": workers, "count": 4096, "batch": 128, "seconds": 4.0} | more
    return Row("input", f"loading: {recipe}, {workers} workers", "gpu_input.loading", options, 45)


def _waiting(form: str, pair: str = "swin-s-resnet50", batch: int = 128, **more: Any) -> Row:
    options = {"pair": pair, "form": form, "batch": batch, "levers": "plain", "recipe": "crop, flip"}
    options |= {"workers": 16, "count": 4096, "seconds": 8.0} | more
    return Row(
        "input", f"training: {pair} {form} {batch}, {options['workers']} workers", "gpu_input.waiting", options, 60
    )


def _tiny() -> Iterator[Row]:
    """The same functions as the real rows, on models of a few thousand parameters."""
    for form in FORMS:
        yield _step("tiny", form, 8, "plain", **SHORT)
    for levers in ("teacher", "streams", "float32", "tf32"):
        yield _step("tiny", "default", 8, levers, **SHORT)
    yield _step("tiny", "kd", 8, "teacher+compile", backend="eager", **SHORT)
    yield _step("tiny", "kd", 8, "graphs", backend="eager", **SHORT)
    yield _loading("crop, flip, RandAugment, erase", 1, count=16, batch=8, seconds=0.1)
    yield _waiting("kd", "tiny", 8, workers=1, count=16, seconds=0.1)
    yield Row("timm", "tiny", "gpu_speed.timm_speed", {"pair": "tiny", "batch": 8, "rounds": 2}, 60)


# ---------------------------------------------------------------- the run


def run(chosen: list[Row], device: str, deadline: float, out: Path) -> list[dict[str, Any]]:
    """Runs the rows until the deadline (of `time.monotonic`), and appends each to `out`."""
    done: list[dict[str, Any]] = []
    worker = Worker()
    try:
        for row in chosen:
            left = deadline - time.monotonic()
            if left < 1:
                print(f"The minutes are over: {len(chosen) - len(done)} rows were not run.")
                break
            environment = DETERMINISTIC if row.part == "checks" and device != "cpu" else {}
            if environment != worker.extra:
                worker.close()
                worker = Worker(environment)
            began = time.monotonic()
            answer = worker.call(row.function, row.options | {"device": device}, min(row.limit, left))
            entry = {
                "part": row.part,
                "name": row.name,
                "options": row.options,
                "device": device,
                "command": shlex.join(["python", *sys.argv]),
                "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "seconds": round(time.monotonic() - began, 2),
                **answer,
            }
            with out.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            print(line_of(entry), flush=True)
            done.append(entry)
    finally:
        worker.close()
    return done


def line_of(entry: dict[str, Any]) -> str:
    """A row for the screen."""
    head = f"{entry['part']:7}{entry['name']:52}{entry['seconds']:6.1f} s  "
    if "error" in entry:
        return f"{head}ERROR {entry['error'].splitlines()[0][:150]}"
    found = entry["result"]
    if "passed" in found:
        return head + ("passed" if found["passed"] else f"FAILED {json.dumps(found)[:400]}")
    values = [f"{found['images_per_s']:,.0f} images/s"] if "images_per_s" in found else []
    values += [f"{found['ms'][0]:.1f} ms"] if "ms" in found else []
    values += [f"{found['peak_mb'] / 1000:.1f} GB"] if found.get("peak_mb") else []
    values += [f"busy {found['busy']:.0%}"] if found.get("busy") else []
    values += [f"waits {found['waits']:.1%}"] if "waits" in found else []
    return head + (", ".join(values) or json.dumps(found)[:150])


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; for a name that it has several times, the last one with a result, else the last one."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        key = entry["part"], entry["name"]
        if "result" in entry or "result" not in found.get(key, {}):
            found[key] = entry
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (default: cuda)")
    parser.add_argument("--minutes", type=float, default=8.0, help="when to stop (default: 8)")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part to run; may be repeated (default: all)")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few rows, to test this script")
    parser.add_argument("--missing", action="store_true", help="only rows that have no result in the file yet")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a file of JSON lines, appended to")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    args.out.parent.mkdir(parents=True, exist_ok=True)
    known = read(args.out) if args.missing and args.out.exists() else []
    have = {(entry["part"], entry["name"]) for entry in known if "result" in entry}
    chosen = [r for r in rows(args.tiny) if r.part in (args.only or PARTS) and (r.part, r.name) not in have]
    done = run(chosen, args.device, deadline, args.out)
    failed = [entry["name"] for entry in done if "error" in entry or entry["result"].get("passed") is False]
    print(
        f"{len(done) - len(failed)} of {len(chosen)} rows have a result in {args.out}; failed: {', '.join(failed) or 'none'}"
    )


if __name__ == "__main__":
    main()
