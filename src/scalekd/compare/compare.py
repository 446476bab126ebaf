"""Runs a ladder's comparison into a folder; a second call resumes it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from scalekd.common.errors import UserError
from scalekd.common.files import in_use, reject_links, write_text
from scalekd.common.pages import as_commands
from scalekd.common.provenance import command_line, versions
from scalekd.common.stop import StopRequest
from scalekd.common.text import duration, say
from scalekd.data.description import KEY, tell_data
from scalekd.data.split import open_split
from scalekd.distill.teacher_outputs import SUFFIX

from .board import Board
from .ladder import Job, Ladder, jobs, ladder_text
from .page import markdown
from .plot import curve_plot, gain_plot
from .report import write_comparison
from .results import FILE, Record, known_records, record_of, summary, write_records
from .runner import FAILED, FINISHED, Place, run_all


def compare(
    ladder: Ladder,
    source: str,
    overrides: Sequence[str],
    out: Path,
    places: Sequence[Place],
    *,
    share: bool,
    known: Sequence[Path] = (),
    stop: StopRequest,
    console: Console,
) -> dict[str, Any]:
    """Runs every job of `ladder` that is not finished; writes results, summary, page and plots into `out`.

    The files are results.jsonl, summary.json, summary.md, report.html, gain.svg and curves.svg.

    Args:
        source: the ladder's name or file; its header is shown on the page.
        places: the devices that runs are distributed over, one run at a time on each.
        share: one teacher pass for the runs of a seed, kept in `out`/outputs until the seed is done.
        known: folders of other comparisons; their finished runs are reused where the recipe is the same.

    Returns the content of summary.json. Raises `UserError`, and `Stopped` after all runs saved a checkpoint.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("compare starts one process for each run itself; start it without torchrun")
    planned = jobs(ladder, overrides)
    for folder in known:
        reject_links(folder)
        if not (folder / FILE).is_file():
            raise UserError(f"`known`: {folder} is not the folder of a comparison: it has no {FILE}")
    _check_out(out)
    with in_use(out):
        records = known_records(out, planned, known)
        missing = [job for job in planned if job not in records]
        counts = f"{len(planned)} runs, {len(records)} of them already finished"
        where = f"{len(places)} at a time on {places[0].device}"
        say(console, f"{ladder.title or ladder.name}: {counts}; {where}")
        described = _described(planned[0], out, bool(missing))
        tell_data(console, described)
        began = time.monotonic()
        failed: dict[Job, str] = {}
        try:
            stop.wait_for_step = True
            _run_missing(missing, Board(ladder, planned, records, out, console), places, stop, failed, share)
        finally:
            ordered = _in_order(planned, records)
            write_records(out, ordered)
            result = summary(
                ladder,
                planned,
                ordered,
                about=_header(source),
                command=command_line(),
                versions=versions(),
                teacher_top1=_teacher_top1(planned),
                data_description=described,
                wall_seconds=_total_wall_seconds(out, time.monotonic() - began if missing else 0.0),
                failed=[_failure(job, error) for job, error in failed.items()],
            )
            _write_pages(out, result, console)
    return result


def _run_missing(
    missing: Sequence[Job],
    board: Board,
    places: Sequence[Place],
    stop: StopRequest,
    failed: dict[Job, str],
    share: bool,
) -> None:
    """Runs `missing`; adds what finishes to `board.records`, and the error of what fails to `failed`."""
    out, planned, records = board.out, board.planned, board.records

    def ended(job: Job, code: int) -> None:
        folder = out / "runs" / job.folder
        record = record_of(job, folder) if code == FINISHED else None
        if record:
            records[job] = record
            write_records(out, _in_order(planned, records))
        elif code in (FINISHED, FAILED) or code < 0:
            failed[job] = _error_of(folder, code)
        board.ended(job, record, failed.get(job))
        if share and not any(j.seed == job.seed and j not in records and j not in failed for j in planned):
            _remove_outputs(out, job.seed)  # all runs of this seed are done

    with board:
        outputs = out / "outputs" if share else None
        run_all(missing, lambda job: out / "runs" / job.folder, outputs, places, ended, board.show, stop)
    if len(records) == len(planned):
        shutil.rmtree(out / "outputs", ignore_errors=True)


def _described(job: Job, out: Path, running: bool) -> dict[str, Any]:
    """The data of the first run, of which the others use the same; what an earlier call kept if no run is missing.

    Raises `UserError` for anything wrong with the data, before any run starts.
    """
    if running:
        return dict(open_split(job.config.data).described)
    try:
        return dict(json.loads((out / "summary.json").read_text())[KEY])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _check_out(out: Path) -> None:
    """Raises `UserError` if `out` cannot be read or holds something other than a comparison."""
    try:
        inside = [p.name for p in out.iterdir()] if out.exists() else []
    except OSError as error:
        raise UserError(f"cannot use {out}: {error}. Choose a readable and writable folder with `out`.") from None
    known = {"results.jsonl", "runs", "outputs", ".lock"}
    if inside and not known & set(inside):
        raise UserError(f"{out} is not empty and holds no comparison; choose another folder with `out`")


def _in_order(planned: Sequence[Job], records: dict[Job, Record]) -> dict[Job, Record]:
    return {job: records[job] for job in planned if job in records}


def _header(source: str) -> list[str]:
    """The comment lines of a ladder file."""
    lines = ladder_text(source).splitlines()
    return [as_commands(line.lstrip("# ").rstrip()) for line in lines if line.startswith("#")]


def _teacher_top1(planned: Iterable[Job]) -> float | None:
    known = {job.config.teacher.top1 for job in planned if job.config.teacher}
    return known.pop() if len(known) == 1 else None


def _total_wall_seconds(out: Path, seconds: float) -> float:
    """`seconds` plus the wall time of earlier calls into the same folder."""
    try:
        before = float(json.loads((out / "summary.json").read_text())["wall_seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        before = 0.0
    return round(before + seconds, 1)


def _failure(job: Job, error: str) -> dict[str, Any]:
    return {"student": job.student, "method": job.method, "seed": job.seed, "error": error}


def _error_of(folder: Path, code: int) -> str:
    """Why the run in `folder` ended: the signal, or the last error in its log."""
    if code < 0:
        return f"ended by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    log = folder.with_name(folder.name + ".log")
    lines = [line for line in log.read_text().splitlines() if line.strip()] if log.is_file() else []
    errors = [i for i, line in enumerate(lines) if line.startswith("scalekd: ")]
    text = " ".join(lines[errors[-1] :]) if errors else (lines or ["no message"])[-1]
    return f"{text.removeprefix('scalekd: ')}  ({log})"


def _remove_outputs(out: Path, seed: int) -> None:
    for file in (out / "outputs").glob(f"seed-{seed}-*{SUFFIX}"):
        file.unlink(missing_ok=True)


def _write_pages(out: Path, result: dict[str, Any], console: Console) -> None:
    write_text(out / "summary.json", json.dumps(result, indent=1) + "\n")
    write_text(out / "summary.md", markdown(result))
    write_comparison(out, out / "report.html", result)
    write_text(out / "gain.svg", gain_plot(result))
    if curves := curve_plot(result):
        write_text(out / "curves.svg", curves)
    for failure in result["failed"]:
        say(console, f"failed: {failure['student']} {failure['method']} seed {failure['seed']}: {failure['error']}")
    finished = f"{result['finished']} of {result['planned']} runs finished ({duration(result['wall_seconds'])})."
    say(console, f"{finished}  table {out / 'summary.md'}  page {out / 'report.html'}")
