"""Runs `scalekd demo`: distils a ViT into a small CNN on images that come with the package.

The recipe `demo` runs three times with the same images, steps and schedule: without a teacher, with KD, with ScaleKD.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from scalekd.common.files import write_text
from scalekd.common.parallel import pick_device
from scalekd.common.text import duration, say
from scalekd.config.recipe import Config, load_recipe
from scalekd.data.batches import eval_batches
from scalekd.distill.distiller import Distiller
from scalekd.distill.evaluate import evaluate
from scalekd.models.student_file import export_onnx, load_student
from scalekd.report.curves import ReportRun
from scalekd.report.several_runs import write_report
from scalekd.runs.distillation import checked, execute, facts
from scalekd.train.log import read_log
from scalekd.train.resume import recipe_difference

METHODS = {
    "baseline": ["teacher=null", "losses.kd=off", "losses.scalekd=off", "losses.ce.weight=1"],
    "kd": ["losses.scalekd=off"],
    "scalekd": [],
}
NAMES = {"baseline": "no teacher", "kd": "KD", "scalekd": "ScaleKD"}


Results = dict[str, list[dict[str, Any]]]  # method -> the summary of its run with each seed


def demo(folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Runs every method with every seed into `folder`; writes report.html, summary.json and summary.md there.

    Finished runs in `folder` are read, not repeated. Returns the content of summary.json.
    """
    console = Console(emoji=False)
    device = pick_device()
    began = time.perf_counter()
    recipe = load_recipe("demo", [f"seed={seeds[0]}"])
    console.print(
        f"Distilling a ViT into a small CNN: {recipe.data.limit:,} labelled Fashion-MNIST images, 10,000 for testing, "
        f"on this machine ({device}).\n",
        highlight=False,
    )
    run = checked(recipe, device, console)
    run_facts = facts(run)
    teacher_top1 = teacher_accuracy(run.distiller, eval_batches(run.val_images, 256, 0, False), device)
    console.print(f"  teacher on all {len(run.val_images):,} test images: {teacher_top1:.2f} %\n", highlight=False)

    results = _run_all(folder, seeds, device, console)
    top1 = {name: [r["top1"] for r in runs] for name, runs in results.items()}
    console.print(_table(teacher_top1, results))
    console.print(_verdict(top1), highlight=False)
    exported = folder / f"scalekd-seed{seeds[0]}" / "student.safetensors"
    student, card = load_student(exported)
    differences = {
        "timm": results["scalekd"][0]["reload_difference"],
        "onnxruntime": export_onnx(student, exported.with_suffix(".onnx"), card),
    }
    summary: dict[str, Any] = {
        "top1": {"teacher": round(teacher_top1, 2)}
        | {name: round(statistics.mean(values), 2) for name, values in top1.items()},
        "top1_by_seed": top1,
        "seeds": list(seeds),
        "seconds": round(time.perf_counter() - began, 1),
        "seconds_by_run": {name: [r["seconds"] for r in runs] for name, runs in results.items()},
        "largest_difference_of_logits": differences,
        "facts": run_facts,
    }
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_text(folder / "summary.md", markdown(summary))
    _report(folder, results, seeds, teacher_top1, run_facts)
    console.print(
        f"\nstudent  {exported}  timm loads it back: largest difference of logits {differences['timm']:.1e}\n"
        f"         {exported.with_suffix('.onnx')}  onnxruntime: {differences['onnxruntime']:.1e}\n"
        f"report   {folder / 'report.html'}\nsummary  {folder / 'summary.json'}   ({duration(summary['seconds'])})",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return summary


def markdown(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table, as in the README."""
    by_seed, seconds = summary["top1_by_seed"], summary["seconds_by_run"]
    lines = [
        "| | top-1 % | gain over no teacher | seconds a run |",
        "|---|---|---|---|",
        f"| the teacher, a ViT | {summary['top1']['teacher']:.2f} | | |",
    ]
    for name, values in by_seed.items():
        gains = [a - b for a, b in zip(values, by_seed["baseline"])]
        lines.append(
            f"| CNN, {NAMES[name]} | {_mean_and_spread(values)} | "
            f"{'' if name == 'baseline' else _mean_and_spread(gains, '+')} | {statistics.median(seconds[name]):.0f} |"
        )
    machine = summary["facts"]["machine"]
    lines += [
        "",
        f"Mean ± standard deviation over {len(summary['seeds'])} seeds; gains are paired by seed; seconds are medians. {machine}. "
        f"Command: `scalekd demo --seeds {len(summary['seeds'])}`.",
    ]
    return "\n".join(lines) + "\n"


def _mean_and_spread(values: Sequence[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{spread}"


def _run_all(folder: Path, seeds: Sequence[int], device: torch.device, console: Console) -> Results:
    results: Results = {name: [] for name in METHODS}
    for seed in seeds:
        for name, overrides in METHODS.items():
            config = load_recipe("demo", [f"name=demo-{name}", f"seed={seed}", *overrides])
            results[name].append(
                _run_or_read(config, folder / f"{name}-seed{seed}", device, console, f"{NAMES[name]:10} seed {seed}")
            )
    return results


def _run_or_read(config: Config, folder: Path, device: torch.device, console: Console, title: str) -> dict[str, Any]:
    finished, recipe = folder / "summary.json", folder / "recipe.yaml"
    if finished.is_file() and recipe.is_file() and not recipe_difference(recipe.read_text(), config):
        summary = json.loads(finished.read_text())
        say(console, f"{title}  top-1 {summary['top1']:.2f} %  (already in {folder})")
        return summary
    return execute(config, folder, device, console, check=False, title=title, look=False)


def teacher_accuracy(distiller: Distiller, batches: Any, device: torch.device) -> float:
    """Top-1 in % of the distiller's teacher. batches: from `scalekd.data.batches.eval_batches`."""
    assert distiller.teacher_view is not None
    return evaluate(distiller.teacher_view.model, batches, distiller.teacher_mean, distiller.teacher_std, device)[
        "top1"
    ]


def _table(teacher_top1: float, results: Results) -> Table:
    table = Table(box=None, padding=(0, 2))
    for column in ("", "top-1 %", "gain", "seconds a run"):
        table.add_column(column, justify="left" if column == "" else "right")
    table.add_row("teacher (ViT)", f"{teacher_top1:.2f}", "", "")
    base = statistics.mean(r["top1"] for r in results["baseline"])
    for name, runs in results.items():
        values = [r["top1"] for r in runs]
        table.add_row(
            f"CNN, {NAMES[name]}",
            _mean_and_spread(values),
            f"{statistics.mean(values) - base:+.2f}" if name != "baseline" else "",
            f"{statistics.median(r['seconds'] for r in runs):.0f}",
        )
    return table


def _verdict(top1: dict[str, list[float]]) -> str:
    gains = [s - b for s, b in zip(top1["scalekd"], top1["baseline"])]
    if len(gains) == 1:
        return f"\nGain of ScaleKD over no teacher: {gains[0]:+.2f} points on one seed. `scalekd demo --seeds 5` shows the spread."
    spread = max(statistics.stdev(values) for values in (top1["scalekd"], top1["baseline"]))
    return (
        f"\nGain of ScaleKD over no teacher: {statistics.mean(gains):+.2f} points over {len(gains)} seeds "
        f"(smallest {min(gains):+.2f}, largest {max(gains):+.2f}). Standard deviation of one method over seeds: {spread:.2f}."
    )


def _report(
    folder: Path,
    results: Results,
    seeds: Sequence[int],
    teacher_top1: float,
    run_facts: dict[str, str],
) -> None:
    runs = []
    for name, summaries in results.items():
        config = load_recipe("demo", METHODS[name])
        runs.append(
            ReportRun(
                NAMES[name],
                read_log(folder / f"{name}-seed{seeds[0]}"),
                [s["top1"] for s in summaries],
                [s["seconds"] for s in summaries],
                config.losses,
            )
        )
    write_report(
        folder / "report.html",
        title="scalekd demo",
        runs=runs,
        facts=run_facts | {"seeds": ", ".join(map(str, seeds))},
        teacher_top1=teacher_top1,
    )
