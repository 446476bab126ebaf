"""Runs a ladder's comparison into a folder; a second call resumes it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from scalekd.common.documentation import as_commands
from scalekd.common.errors import UserError
from scalekd.common.files import in_use, reject_links, write_text
from scalekd.common.provenance import command_line, versions
from scalekd.common.stop import StopRequest
from scalekd.common.text import counted, duration, printable, say
from scalekd.data.description import KEY, tell_data
from scalekd.runs.heads import fit_into, with_heads
from scalekd.train.hardware import resolved

from .figure import NAMES, figure_in, open_data, refuse_other_figures
from .ladder import Job, Ladder, fits_heads, jobs, ladder_text
from .page import markdown
from .plot import curve_plot, gain_plot
from .progress import Board
from .report import write_comparison
from .results import FILE, Record, held_values, known_records, record_of, summary, write_records
from .runner import FAILED, FINISHED, Place, run_all
from .same_inputs import check_finished
from .shared_outputs import Outputs


def compare(
    ladder: Ladder,
    source: str,
    overrides: Sequence[str],
    out: Path,
    places: Sequence[Place],
    *,
    share: bool,
    known: Sequence[Path] = (),
    whole: Ladder | None = None,
    stop: StopRequest,
    console: Console,
) -> dict[str, Any]:
    """Runs every job of `ladder` that is not finished; writes results, summary, page and plots into `out`.

    The files are results.jsonl, summary.json, summary.md, report.html, gain.svg and curves.svg.

    Args:
        source: the ladder's name or file; its header is shown on the page.
        places: the devices that runs are distributed over, one run at a time on each.
        share: one teacher pass for the runs of a seed, kept in `out`/outputs until the seed is done.
        whole: the ladder of which `ladder` is a part; shared outputs are kept until its runs of a seed are finished.
        known: folders of other comparisons; their finished runs are reused where the recipe is the same.

    Returns the content of summary.json. Raises `UserError`, and `Stopped` after all runs saved a checkpoint.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("compare starts one process for each run itself; start it without torchrun")
    wanted = jobs(ladder, overrides)
    planned = settled(wanted, out, places[0])
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
        say(console, f"{ladder.title or ladder.name}: {counts}; {where}; {_budget(planned)}")
        described, figure = _described(planned, records, out)
        if missing or known:
            check_finished(records, out)
        tell_data(console, described)
        if missing:
            _fit_heads(wanted, out, places[0], console)
        began = time.monotonic()
        failed: dict[Job, str] = {}
        try:
            stop.wait_for_step = True
            board = Board(ladder, planned, records, out, console, len(places))
            outputs = Outputs(out, planned, _rest(whole, planned, overrides, out, places[0])) if share else None
            _run_missing(missing, board, places, stop, failed, outputs)
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
                metric=f"{NAMES[figure]} %",
                teacher_top1=_teacher_top1(planned) if figure == "top1" else None,
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
    outputs: Outputs | None,
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
        if outputs:
            outputs.remove_done(job.seed, {*records, *failed})

    with board:
        folder, also = (outputs.folder, outputs.losses) if outputs else (None, [])
        run_all(missing, lambda job: out / "runs" / job.folder, folder, also, places, ended, board.show, stop)
    if outputs and len(records) == len(planned):
        outputs.finish(board.console)


def _described(planned: Sequence[Job], records: dict[Job, Record], out: Path) -> tuple[dict[str, Any], str]:
    """The data of the first run, and the key of the figure of all runs; what an earlier call kept if no run is missing.

    Raises `UserError` for anything wrong with the data, before any run starts.
    """
    if len(records) < len(planned):
        split = open_data(planned)
        refuse_other_figures(records, split.multi_label)
        return dict(split.described), "map" if split.multi_label else "top1"
    figure = figure_in(records[planned[0]])
    refuse_other_figures(records, figure == "map")
    try:
        return dict(json.loads((out / "summary.json").read_text())[KEY]), figure
    except (OSError, ValueError, KeyError, TypeError):
        return {}, figure


def _check_out(out: Path) -> None:
    """Raises `UserError` if `out` cannot be read or holds something other than a comparison."""
    try:
        inside = [p.name for p in out.iterdir()] if out.exists() else []
    except OSError as error:
        raise UserError(f"cannot use {out}: {error}. Choose a readable and writable folder with `out`.") from None
    known = {"results.jsonl", "runs", "outputs", "head", ".lock"}
    if inside and not known & set(inside):
        raise UserError(f"{out} is not empty and holds no comparison; choose another folder with `out`")


def settled(planned: Sequence[Job], out: Path, place: Place) -> list[Job]:
    """The jobs with a value in place of every `auto`, and a folder in `out` in place of every head to fit.

    The values are those of the runs in `out` if there are any, else the place's.
    """
    held = held_values(out)
    device = torch.device(place.device)
    return [replace(job, config=with_heads(resolved(job.config, device, held, place.threads), out)) for job in planned]


def _fit_heads(planned: Sequence[Job], out: Path, place: Place, console: Console) -> None:
    """Fits the heads that the runs ask for, once for all of them; not again once a run has begun."""
    job = next((job for job in planned if fits_heads(job.config)), None)
    if job is not None and not any((out / "runs").glob("*/recipe.yaml")):
        fit_into(out, job.config, torch.device(place.device), console)


def _rest(whole: Ladder | None, planned: Sequence[Job], overrides: Sequence[str], out: Path, place: Place) -> list[Job]:
    """The runs of the whole ladder that are not planned now and not finished."""
    try:
        every = settled(jobs(whole, overrides), out, place) if whole else []
    except UserError:  # a problem of a run that is not planned
        return []
    now = {(job.student, job.method, job.seed) for job in planned}
    later = [job for job in every if (job.student, job.method, job.seed) not in now]
    finished = known_records(out, later)
    return [job for job in later if job not in finished]


def _budget(planned: Sequence[Job]) -> str:
    """How long the runs are: `100 epochs each`."""
    epochs = sorted({job.config.train.epochs for job in planned})
    return f"{counted(epochs[0], 'epoch')} each" if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]} epochs each"


def _in_order(planned: Sequence[Job], records: dict[Job, Record]) -> dict[Job, Record]:
    return {job: records[job] for job in planned if job in records}


def _header(source: str) -> list[str]:
    """The comment lines of a ladder file."""
    lines = ladder_text(source).splitlines()
    return [printable(as_commands(line.lstrip("# ").rstrip())) for line in lines if line.startswith("#")]


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
