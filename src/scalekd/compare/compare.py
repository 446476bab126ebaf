"""`scalekd compare`: methods x students x seeds on one data set, into a folder that a second call goes on with."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scalekd.common.errors import UserError
from scalekd.common.files import in_use, write_text
from scalekd.common.provenance import command_line, versions
from scalekd.common.stop import StopRequest
from scalekd.common.text import duration, printable
from scalekd.distill.teacher_outputs import SUFFIX

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
    at: Sequence[Place],
    *,
    share: bool,
    known: Sequence[Path] = (),
    stop: StopRequest,
    console: Console,
) -> dict[str, Any]:
    """Runs what is not there yet and writes results.jsonl, summary.json and .md, report.html and its plots into `out`.

    source: the ladder's name or file, whose header is shown. share: one teacher pass for the runs of a seed.
    known: folders of other comparisons whose finished runs count where the recipe is the same.
    Returns what summary.json holds. Raises `UserError`, and `Stopped` with everything saved.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("compare starts its runs itself, one process each; start it without torchrun")
    planned = jobs(ladder, overrides)
    for folder in known:
        if not (folder / FILE).is_file():
            raise UserError(f"--known: {folder} holds no comparison ({FILE} is not there)")
    _open(out)
    with in_use(out):
        records = known_records(out, planned, known)
        board = Board(ladder, planned, records, out, console)
        missing = [job for job in planned if job not in records]
        console.print(
            f"{ladder.title or ladder.name}: {len(planned)} runs, {len(records)} of them finished before; "
            f"{len(at)} at a time on {at[0].device}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        began = time.monotonic()
        failed: dict[Job, str] = {}

        def ended(job: Job, code: int) -> None:
            folder = out / "runs" / job.folder
            record = record_of(job, folder) if code == FINISHED else None
            if record:
                records[job] = record
                write_records(out, _in_order(planned, records))
            elif code in (FINISHED, FAILED) or code < 0:
                failed[job] = _last_words(folder, code)
            board.ended(job, record, failed.get(job), code)
            if share and not any(j.seed == job.seed and j not in records and j not in failed for j in planned):
                _remove_outputs(out, job.seed)  # nobody will read them

        def told(records: dict[Job, Record]) -> dict[str, Any]:
            return summary(
                ladder,
                planned,
                _in_order(planned, records),
                about=_about(source),
                command=command_line(),
                versions=versions(),
                teacher_top1=_teacher_top1(planned),
                wall_seconds=_wall(out, time.monotonic() - began, bool(missing)),
                failed=[_failure(job, error) for job, error in failed.items()],
            )

        try:
            stop.wait_for_step = True
            with board:
                outputs = out / "outputs" if share else None
                run_all(missing, lambda job: out / "runs" / job.folder, outputs, at, ended, board.show, stop)
            if len(records) == len(planned):
                shutil.rmtree(out / "outputs", ignore_errors=True)
        finally:
            write_records(out, _in_order(planned, records))
            found = told(records)
            _write_pages(out, found, console)
    return found


def _open(out: Path) -> None:
    """Refuses a folder that holds something else."""
    try:
        inside = [p.name for p in out.iterdir()] if out.exists() else []
    except OSError as error:
        raise UserError(f"cannot use {out}: {error}. Give --out a folder that you may read and write.") from None
    known = {"results.jsonl", "runs", "outputs", ".lock"}
    if inside and not known & set(inside):
        raise UserError(f"{out} is not empty and holds no comparison; give --out another folder")


def _in_order(planned: Sequence[Job], records: dict[Job, Record]) -> dict[Job, Record]:
    return {job: records[job] for job in planned if job in records}


def _about(source: str) -> list[str]:
    lines = ladder_text(source).splitlines()
    return [line.lstrip("# ").rstrip() for line in lines if line.startswith("#")]


def _teacher_top1(planned: Iterable[Job]) -> float | None:
    known = {job.config.teacher.top1 for job in planned if job.config.teacher}
    return known.pop() if len(known) == 1 else None


def _wall(out: Path, seconds: float, ran: bool) -> float:
    """All sessions of this comparison together."""
    try:
        before = float(json.loads((out / "summary.json").read_text())["wall_seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        before = 0.0
    return round(before + (seconds if ran else 0.0), 1)


def _failure(job: Job, error: str) -> dict[str, Any]:
    return {"student": job.student, "method": job.method, "seed": job.seed, "error": error}


def _last_words(folder: Path, code: int) -> str:
    if code < 0:
        return f"ended by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    log = folder.with_name(folder.name + ".log")
    lines = [line for line in log.read_text().splitlines() if line.strip()] if log.is_file() else []
    told = [i for i, line in enumerate(lines) if line.startswith("scalekd: ")]
    words = " ".join(lines[told[-1] :]) if told else (lines or ["no message"])[-1]
    return f"{words.removeprefix('scalekd: ')}  ({log})"


def _remove_outputs(out: Path, seed: int) -> None:
    for file in (out / "outputs").glob(f"seed-{seed}-*{SUFFIX}"):
        file.unlink(missing_ok=True)


def _write_pages(out: Path, told: dict[str, Any], console: Console) -> None:
    write_text(out / "summary.json", json.dumps(told, indent=1) + "\n")
    write_text(out / "summary.md", markdown(told))
    write_comparison(out, out / "report.html", told)
    write_text(out / "gain.svg", gain_plot(told))
    if curves := curve_plot(told):
        write_text(out / "curves.svg", curves)
    for failure in told["failed"]:
        words = f"failed: {failure['student']} {failure['method']} seed {failure['seed']}: {failure['error']}"
        console.print(printable(words), highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{told['finished']} of {told['planned']} runs finished ({duration(told['wall_seconds'])}).  "
        f"table {out / 'summary.md'}  page {out / 'report.html'}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _progress(folder: Path) -> str:
    """How far the run in `folder` is, by the end of its log: '62/744'."""
    try:
        with open(folder / "log.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4000))
            steps = re.findall(rb'"step": (\d+), "steps": (\d+)', file.read())
    except OSError:
        steps = []
    return "step {}/{}".format(*(n.decode() for n in steps[-1])) if steps else "starts"


class Board:
    """The live table on a terminal; elsewhere one line for each run that ends."""

    def __init__(self, ladder: Ladder, planned: Sequence[Job], records: dict[Job, Record], out: Path, console: Console):
        self.ladder, self.planned, self.records, self.out, self.console = ladder, planned, records, out, console
        self.students = list(dict.fromkeys(job.student for job in planned))
        self.live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None
        self.began, self.before = time.monotonic(), len(records)

    def __enter__(self) -> Board:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.update(Group(*self.table()), refresh=True)
            self.live.stop()

    def ended(self, job: Job, record: Record | None, failure: str | None, code: int) -> None:
        if self.live:
            return
        told = f"top-1 {record['top1']:.2f} %  {duration(record['seconds'])}" if record else failure or "stopped, saved"
        self.console.print(
            printable(f"[{len(self.records)}/{len(self.planned)}] {job}: {told}{self._left()}"),
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def show(self, running: dict[Job, float]) -> None:
        if self.live:
            now = time.monotonic()
            lines = [
                Text(f"  {job}  {_progress(self.out / 'runs' / job.folder)}  {duration(now - since)}")
                for job, since in running.items()
            ]
            self.live.update(Group(*self.table(), *lines), refresh=True)

    def table(self) -> list[RenderableType]:
        table = Table(box=None, padding=(0, 2))
        table.add_column("method")
        for student in self.students:
            table.add_column(printable(student), justify="right")
        for method in self.ladder.methods:
            cells = [self._cell(student, method) for student in self.students]
            table.add_row(Text(method), *cells)
        return [table, Text(f"  {len(self.records)} of {len(self.planned)} runs{self._left()}")]

    def _cell(self, student: str, method: str) -> str:
        values = [r["top1"] for job, r in self.records.items() if (job.student, job.method) == (student, method)]
        if not values:
            return "-"
        spread = f" ±{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        few = f" ({len(values)})" if len(values) < len(self.ladder.seeds) else ""
        return f"{statistics.mean(values):.2f}{spread}{few}"

    def _left(self) -> str:
        """By the runs that ended so far; one that takes longer than most makes it wrong."""
        done = len(self.records) - self.before
        if not done or len(self.records) == len(self.planned):
            return ""
        seconds = (time.monotonic() - self.began) / done * (len(self.planned) - len(self.records))
        return f"  about {duration(seconds)} left"
