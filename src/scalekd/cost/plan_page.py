"""The result of `scalekd plan` on the screen and as Markdown."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from scalekd.common.text import printable
from scalekd.data.description import KEY, lines_of

WIDE = 2.5  # factor between the ends of an interval
UNITS = ((1, 120, "seconds"), (60, 7200, "minutes"), (3600, 72 * 3600, "hours"), (86400, float("inf"), "days"))


def show(found: dict[str, Any], console: Console) -> None:
    for run in found["runs"]:
        width = max(len(name) for name, _ in _rows(run))
        lines = [_title(run), "", *(f"{name:{width}}  {text}" for name, text in _rows(run)), ""]
        if told := lines_of(run.get(KEY, {})):
            lines += ["Data:", *(f"  - {printable(line)}" for line in told)]
        lines += ["Assumptions:" if run["source"] == "counted" else "Measured, with these assumptions:"]
        lines += [f"  - {line}" for line in run["assumed"]]
        lines += [f"To narrow it: {line}." for line in narrower(run)]
        console.print(*lines, "", sep="\n", markup=False, highlight=False, soft_wrap=True)
    if total := _total(found):
        console.print(total, markup=False, highlight=False, soft_wrap=True)


def markdown(found: dict[str, Any]) -> str:
    lines: list[str] = []
    for run in found["runs"]:
        lines += [f"# {_title(run)}", "", "| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in _rows(run))]
        lines += ["", "Assumptions:", "", *(f"- {line}" for line in run["assumed"]), ""]
        lines += [line for text in narrower(run) for line in (f"To narrow it: {text}.", "")]
    lines += [_total(found), ""] if _total(found) else []
    return "\n".join([*lines, "Made by `scalekd plan` (`scalekd docs plan`)."]) + "\n"


def narrower(run: dict[str, Any]) -> list[str]:
    """What would narrow the interval of a run's time, if its ends differ by more than a factor of `WIDE`."""
    low, high = run["hours"]
    if high <= WIDE * low:
        return []
    if run["source"] == "counted":
        return [
            "`scalekd plan --measure` on the machine that will train times real steps, and image loading if it has the data"
        ]
    lines = []
    if "read" not in run["probe"]:
        lines.append("name the data with --data; the speed of image loading is a guess without them")
    elif not run.get("together") and run["workers"]:
        lines.append(
            "--together times steps while the workers load; without it, it is unknown how much one takes from the other"
        )
    times = [run["train"][1] / run["train"][0], run["read"][1] / run["read"][0]]
    if not lines or times[0] > WIDE:
        lines.append("measure again while nothing else runs here, and with --batch set to the run's images per step")
    return lines


def between(low: float, high: float) -> str:
    """Such as `12 to 120`: two digits each, whole numbers from 10 on."""
    first, last = _rounded(low), _rounded(high)
    return first if first == last else f"{first} to {last}"


def _rounded(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 10 else f"{value:.2g}"


def duration(hours: list[float]) -> str:
    """Such as `1.2 to 46 hours`, in the unit that suits the longer time. hours: [low, high]."""
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
    speed = f"computing {between(*run['train'])}, loading {between(*run['read'])}"
    speed += ", timed together" * bool(run.get("together"))
    micro = run["batch_per_gpu"]
    amount = f"{run['samples']:,} samples: {run['epochs']} epochs of {run['images']:,} images ({run['images_from']})"
    return [
        ("time", f"{duration(run['hours'])}{hours}, without model building, pre-flight and export"),
        ("speed", f"{between(*run['images_per_s'])} images/s ({speed})"),
        ("bottleneck", _limit(run)),
        ("memory", _memory(run, at_cpu)),
        ("amount", amount),
        (
            "steps",
            f"{run['steps']:,} of {run['batch']} images" + ("" if micro == run["batch"] else f", {micro} at a time"),
        ),
        ("validation", f"{run['validations']} times {run['validation_images']:,} images"),
    ]


def _limit(run: dict[str, Any]) -> str:
    device = "the CPU" if run["shared_cores"] else "the GPU"
    least, most = run["workers_needed"]
    needed = f"{least} to {most}" if most > least else f"{least}"
    now = f"data.workers is {run['workers']}"
    if run["limit"] == "both in turns":
        return f"image loading and {device} in turns, because {now}"
    if run["limit"] == "device":
        return f"{device}; {now}, which is enough"
    per_gpu = "" if run["shared_cores"] else " per GPU"
    what = "image loading" if run["limit"] == "reading" else f"{device}, or image loading"
    return f"{what}: {needed} workers{per_gpu} would keep up; {now}"


def _memory(run: dict[str, Any], at_cpu: bool) -> str:
    used = f"{between(*(value / 1e3 for value in run['memory_mb']))} GB"
    if at_cpu:
        return f"{used}, plus that of {run['workers']} workers" if run["workers"] else used
    text = f"{used} of {run['memory']['gpu_mb'] / 1e3:.0f} per GPU at {run['batch_per_gpu']} images"
    if run["largest_batch"] is None:
        return text
    least, most = run["largest_batch"]
    if run["batch_per_gpu"] <= least:
        return f"{text}; {between(least, most)} images would fit"
    fits = f"DOES NOT FIT, at most {most} do" if run["batch_per_gpu"] > most else f"may not fit, {least} to {most} do"
    return f"{text}: {fits}; raise train.accumulate"


def _total(found: dict[str, Any]) -> str:
    if len(found["runs"]) < 2:
        return ""
    names = ", then ".join(run["name"] for run in found["runs"])
    return f"In total, {names}: {duration(found['hours'])}, {between(*found['gpu_hours'])} GPU-hours."
