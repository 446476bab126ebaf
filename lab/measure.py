"""Measures what the features of a finished ladder's students have learnt, in addition to top-1.

    python lab/measure.py docs/results/lab/ladder

For each run whose folder exists, on the CPU, without gradients:

    agreement   % of the test canvases on which student and teacher predict the same class
    probe       top-1 in % of a linear classifier on the pooled final map, on other images: single items of 10 classes,
                anywhere on the canvas. Ridge regression to one-hot labels; its strength is chosen on a held-out quarter
    distance    of the alternative components: both final maps without their mean over positions, the student's after a
                linear map fitted by ridge regression on 2,000 canvases of the search part; 2 - 2 cos, averaged over
                the positions of the test canvases. 0: same directions; 2: unrelated

Writes measures.jsonl (one line per run; runs in it are not measured again), measures.json and measures.md. Runs that
the comparison reused from another one (`compare --known`) take their measures from there, so measure that one first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from scalekd.analyze.distance import LinearMap, distances, mapped, solve_ridge
from scalekd.common.intervals import half_width
from scalekd.compare.ladder import Job, jobs, load_ladder
from scalekd.compare.results import read_records
from scalekd.data.sources.open import open_source
from scalekd.models.build import build_model
from scalekd.models.options import Model
from scalekd.models.stages import StageView
from scalekd.models.student_file import load_student

HERE = Path(__file__).parent
STRENGTHS = [10.0**k for k in range(-4, 4)]  # of the ridge, times the mean of the squared features
MEAN, STD = 0.25, 0.33
KINDS = ("agreement", "probe", "distance")


def main(out: Path) -> None:
    ladder = load_ladder(str(HERE / f"{out.name}.yaml"))
    file = out / "measures.jsonl"
    known = measured_in(out)
    known += borrowed(out, known)
    done = {(m["student"], m["method"], m["seed"]) for m in known}
    planned = jobs(ladder)
    missing = [j for j in planned if (j.student, j.method, j.seed) not in done]
    missing = [j for j in missing if (out / "runs" / j.folder / "summary.json").is_file()]
    if missing:
        parts = {name: images(name) for name in ("test", "search", "probe-train", "probe-test")}
        parts["search"] = parts["search"][0][:2000], parts["search"][1][:2000]
        teacher = the_teacher(missing)
        seen = {name: features(teacher, parts[name][0]) for name in ("test", "search")}
        with open(file, "a") as lines:
            for job in missing:
                student, _ = load_student(out / "runs" / job.folder)
                view = StageView(student.eval(), name=job.student, image_size=(40, 40))
                measured = measure(view, parts, seen)
                known.append({"student": job.student, "method": job.method, "seed": job.seed} | measured)
                lines.write(json.dumps(known[-1]) + "\n")
                lines.flush()
    tell(out, [*dict.fromkeys((j.student, j.method) for j in planned)], known)


def measured_in(out: Path) -> list[dict]:
    file = out / "measures.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def borrowed(out: Path, known: list[dict]) -> list[dict]:
    """The measures of runs that `out` reused from other comparisons, with the labels they have in `out`."""
    have = {(m["student"], m["method"], m["seed"]) for m in known}
    records = [r for r in read_records(out) if "from" in r and (r["student"], r["method"], r["seed"]) not in have]
    found = []
    for record in records:
        there = Path(record["from"])
        names = {(r["student"], r["method"], r["seed"]) for r in read_records(there) if r["recipe"] == record["recipe"]}
        here = {key: record[key] for key in ("student", "method", "seed")}
        found += [m | here for m in measured_in(there) if (m["student"], m["method"], m["seed"]) in names]
    return found


def the_teacher(planned: list[Job]) -> StageView:
    spec = next(j.config.teacher for j in planned if j.config.teacher)
    assert isinstance(spec, Model)
    teacher, _ = build_model(spec, channels=1, image_size=(40, 40), classes=100, where="teacher")
    return StageView(teacher.eval(), name="teacher", image_size=(40, 40))


def images(name: str) -> tuple[Tensor, Tensor]:
    source = open_source(f"idx:runs/lab/data/{name}", name)
    pixels = torch.from_numpy(source.images.copy()).float().div(255).unsqueeze(1)  # type: ignore[attr-defined]
    return (pixels - MEAN) / STD, torch.tensor(source.targets)


@torch.no_grad()
def features(view: StageView, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and final maps (N, D, H, W)."""
    seen = [view(part) for part in pixels.split(250)]
    return torch.cat([f.logits for f in seen]), torch.cat([f.final for f in seen if f.final is not None])


def measure(view: StageView, parts: dict, seen: dict) -> dict[str, float]:
    logits, final = features(view, parts["test"][0])
    agreement = (logits.argmax(1) == seen["test"][0].argmax(1)).double().mean()
    pooled = {name: features(view, parts[name][0])[1].mean((2, 3)) for name in ("probe-train", "probe-test")}
    right = probe(pooled["probe-train"], parts["probe-train"][1], pooled["probe-test"], parts["probe-test"][1])
    linear, target = LinearMap(), seen["test"][1]
    linear.add(features(view, parts["search"][0])[1], seen["search"][1])
    distance = distances(mapped(final, target, linear.fit()), target).mean()
    return {"agreement": 100 * float(agreement), "probe": right, "distance": float(distance)}


def probe(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Top-1 in % on the test part; the strength is chosen on the last quarter of the training part."""
    centre, scale = x.mean(0), x.std(0) + 1e-6
    x, test_x = (torch.cat([(v - centre) / scale, torch.ones(len(v), 1)], 1).double() for v in (x, test_x))
    target = F.one_hot(y, 10).double()
    cut = len(x) * 3 // 4

    def right(w: Tensor, of: Tensor, labels: Tensor) -> float:
        return 100 * float(((of @ w).argmax(1) == labels).double().mean())

    def fitted(x: Tensor, target: Tensor, strength: float) -> Tensor:
        return solve_ridge(x.T @ x, x.T @ target, strength)

    strength = max(STRENGTHS, key=lambda s: right(fitted(x[:cut], target[:cut], s), x[cut:], y[cut:]))
    return right(fitted(x, target, strength), test_x, test_y)


def tell(out: Path, rows: list[tuple[str, str]], known: list[dict]) -> None:
    table, lines = [], [f"# {out.name}: agreement, probe, distance", ""]
    lines += ["| student | method | runs | agreement with the teacher, % | probe on single items, % | distance |"]
    lines += ["|---|---|---|---|---|---|"]
    for student, method in rows:
        of_row = [m for m in known if (m["student"], m["method"]) == (student, method)]
        if not of_row:
            continue
        cells: dict = {"student": student, "method": method, "runs": len(of_row)}
        shown = []
        for kind in KINDS:
            values = [m[kind] for m in of_row]
            mean, width = sum(values) / len(values), half_width(values)
            cells[kind], cells[f"{kind}_ci95"] = mean, width
            digits = 4 if kind == "distance" else 2
            shown.append(f"{mean:.{digits}f}" + (f" ± {width:.{digits}f}" if width is not None else ""))
        table.append(cells)
        lines.append(f"| {student} | {method} | {len(of_row)} | {' | '.join(shown)} |")
    lines += ["", "± is half the width of the 95 % interval of the mean over seeds, by Student's t.", ""]
    lines += [f"Command: `python lab/measure.py {out}`. What is measured: `lab/measure.py`.", ""]
    (out / "measures.json").write_text(json.dumps(table, indent=1) + "\n")
    (out / "measures.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
