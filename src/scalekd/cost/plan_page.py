"""A plan as text: on the screen, and as Markdown."""

from __future__ import annotations

from typing import Any

from rich.console import Console

UNITS = ((1, 120, "seconds"), (60, 7200, "minutes"), (3600, 72 * 3600, "hours"), (86400, float("inf"), "days"))


def show(found: dict[str, Any], console: Console) -> None:
    for run in found["runs"]:
        width = max(len(name) for name, _ in _rows(run))
        lines = [_title(run), "", *(f"{name:{width}}  {text}" for name, text in _rows(run)), ""]
        lines += ["assumed:" if run["source"] == "counted" else "measured; assumed all the same:"]
        lines += [f"  - {line}" for line in run["assumed"]]
        console.print(*lines, "", sep="\n", markup=False, highlight=False, soft_wrap=True)
    if total := _total(found):
        console.print(total, markup=False, highlight=False, soft_wrap=True)


def markdown(found: dict[str, Any]) -> str:
    lines: list[str] = []
    for run in found["runs"]:
        lines += [f"# {_title(run)}", "", "| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in _rows(run))]
        lines += ["", "Assumed:", "", *(f"- {line}" for line in run["assumed"]), ""]
    lines += [_total(found), ""] if _total(found) else []
    return "\n".join([*lines, "Made by `scalekd plan` (docs/how-to/plan.md)."]) + "\n"


def between(low: float, high: float) -> str:
    """`12 to 120`, each to two digits, whole from 10 on."""
    first, last = _rounded(low), _rounded(high)
    return first if first == last else f"{first} to {last}"


def _rounded(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 10 else f"{value:.2g}"


def duration(hours: list[float]) -> str:
    """In the unit that suits the longer one."""
    seconds = [3600 * value for value in hours]
    length, _, unit = next(u for u in UNITS if seconds[1] < u[1])
    return f"{between(*(value / length for value in seconds))} {unit}"


def _title(run: dict[str, Any]) -> str:
    pair = f"{run['teacher']} -> {run['student']}" if run["teacher"] else run["student"]
    number = f"{run['gpus']} x " if run["gpus"] > 1 else ""
    how = "measured here" if run["source"] == "measured" else "counted, not measured"
    return f"{run['name']}: {pair}, {run['precision']}, {', '.join(run['losses'])}; on {number}{run['on']}, {how}"


def _rows(run: dict[str, Any]) -> list[tuple[str, str]]:
    at_cpu = run["shared_cores"]
    hours = "" if at_cpu else f", {between(*run['gpu_hours'])} GPU-hours"
    speed = f"computing {between(*run['train'])}, reading {between(*run['read'])}"
    micro = run["batch_per_gpu"]
    amount = f"{run['samples']:,} samples: {run['epochs']} epochs of {run['images']:,} images ({run['images_from']})"
    return [
        ("time", f"{duration(run['hours'])}{hours}, without building, pre-flight and export"),
        ("speed", f"{between(*run['images_per_s'])} images/s ({speed})"),
        ("held up by", _limit(run)),
        ("memory", _memory(run, at_cpu)),
        ("amount", amount),
        ("steps", f"{run['steps']:,} of {run['batch']}" + ("" if micro == run["batch"] else f", {micro} at a time")),
        ("validation", f"{run['validations']} times {run['validation_images']:,} images"),
    ]


def _limit(run: dict[str, Any]) -> str:
    device = "the CPU" if run["shared_cores"] else "the GPU"
    least, most = run["workers_needed"]
    needed = f"{least} to {most}" if most > least else f"{least}"
    now = f"data.workers is {run['workers']}"
    if run["limit"] == "both in turns":
        return f"reading and {device} in turns, as {now}"
    if run["limit"] == "device":
        return f"{device}; {now}, which reads fast enough"
    where = "" if run["shared_cores"] else " a GPU"
    sure = "the reading of images" if run["limit"] == "reading" else f"perhaps the reading of images, else {device}"
    return f"{sure}: {needed} workers{where} would keep up, {now}"


def _memory(run: dict[str, Any], at_cpu: bool) -> str:
    used = f"{between(*(value / 1e3 for value in run['memory_mb']))} GB"
    if at_cpu:
        return f"{used}, and that of {run['workers']} workers" if run["workers"] else used
    told = f"{used} of {run['memory']['gpu_mb'] / 1e3:.0f} a GPU at {run['batch_per_gpu']} images"
    if run["largest_batch"] is None:
        return told
    least, most = run["largest_batch"]
    if run["batch_per_gpu"] <= least:
        return f"{told}; {between(least, most)} images would fit"
    fits = f"DOES NOT FIT, {most} at most" if run["batch_per_gpu"] > most else f"may not fit, {least} to {most} do"
    return f"{told}: {fits}; raise train.accumulate"


def _total(found: dict[str, Any]) -> str:
    if len(found["runs"]) < 2:
        return ""
    names = ", then ".join(run["name"] for run in found["runs"])
    return f"All of it, {names}: {duration(found['hours'])}, {between(*found['gpu_hours'])} GPU-hours."
