"""Progress of a comparison: a live table on a terminal, otherwise one line for each run that ends."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scalekd.common.text import duration, printable, say

from .figure import figure_in, figure_text
from .ladder import Job, Ladder
from .results import Record


class Board:
    """Shows `records`, which the caller adds to while runs finish. Enter it before the first run."""

    def __init__(
        self,
        ladder: Ladder,
        planned: Sequence[Job],
        records: dict[Job, Record],
        out: Path,
        console: Console,
        places: int,
    ):
        self.ladder, self.planned, self.records, self.out, self.console = ladder, planned, records, out, console
        self.places = places
        self.first: set[Job] = set()  # runs that began before another one of their seed ended: they fill shared outputs
        self.failed: set[Job] = set()
        self.announced = False
        self.students = list(dict.fromkeys(job.student for job in planned))
        self.live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None
        self.before = len(records)

    def __enter__(self) -> Board:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.update(Group(*self.table()), refresh=True)
            self.live.stop()

    def ended(self, job: Job, record: Record | None, failure: str | None) -> None:
        """Prints the result of a run. On a terminal the table shows it instead."""
        if failure:
            self.failed.add(job)
        if self.live:
            return
        result = f"{figure_text(record)}  {duration(record['seconds'])}" if record else failure or "stopped, saved"
        say(self.console, f"[{len(self.records)}/{len(self.planned)}] {job}: {result}{self._time_left()}")

    def show(self, running: dict[Job, float]) -> None:
        """Redraws the table on a terminal. running: job -> when it started, by `time.monotonic`."""
        ended = {job.seed for job in self.records}
        self.first |= {job for job in running if job.seed not in ended}
        if not self.announced and len(self.planned) > len(self.records) + self.places:
            self._announce(running)
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
        return [table, Text(f"  {len(self.records)} of {len(self.planned)} runs{self._time_left()}")]

    def _cell(self, student: str, method: str) -> str:
        records = (r for job, r in self.records.items() if (job.student, job.method) == (student, method))
        values = [r[figure_in(r)] for r in records]
        if not values:
            return "-"
        spread = f" ±{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        incomplete = f" ({len(values)})" if len(values) < len(self.ladder.seeds) else ""
        return f"{statistics.mean(values):.2f}{spread}{incomplete}"

    def _announce(self, running: dict[Job, float]) -> None:
        """Prints once how long all runs will take, from the first run that has logged its speed."""
        for job, since in running.items():
            left = _seconds_left(self.out / "runs" / job.folder)
            if left is not None:
                missing = len(self.planned) - len(self.records)
                whole = (time.monotonic() - since + left) * missing / min(self.places, missing)
                text = f"about {duration(whole)} for {missing} runs, by the speed of {job}; --seeds, --methods and "
                say(self.console, f"{text}train.epochs make it shorter")
                self.announced = True
                return

    def _time_left(self) -> str:
        """From the times of the runs that ended: of the same row where there are some, else of all."""
        missing = [job for job in self.planned if job not in self.records and job not in self.failed]
        if not missing or len(self.records) == self.before:
            return ""
        seconds = sum(map(self._expected, missing)) / min(self.places, len(missing))
        return f"  about {duration(seconds)} left"

    def _expected(self, job: Job) -> float:
        """Seconds of a run. Once a seed has a finished run, its teacher's outputs may be shared: such runs are like it."""
        fills = job.seed not in {done.seed for done in self.records}
        alike = {done: r["seconds"] for done, r in self.records.items() if (done in self.first) == fills}
        times = alike or {done: r["seconds"] for done, r in self.records.items()}
        same = [t for done, t in times.items() if (done.student, done.method) == (job.student, job.method)]
        return statistics.fmean(same or times.values())


def _log_end(folder: Path) -> bytes:
    """The last lines of a run's log."""
    try:
        with open(folder / "log.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4000))
            return file.read()
    except OSError:
        return b""


def _progress(folder: Path) -> str:
    """The last step in the log of the run in `folder`: 'step 62/744'."""
    steps = re.findall(rb'"step": (\d+), "steps": (\d+)', _log_end(folder))
    return "step {}/{}".format(*(n.decode() for n in steps[-1])) if steps else "starting"


def _seconds_left(folder: Path) -> float | None:
    """What the run in `folder` logged last about its time left."""
    left = re.findall(rb'"left_s": ([\d.]+)', _log_end(folder))
    return float(left[-1]) if left else None
