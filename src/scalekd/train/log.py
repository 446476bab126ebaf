"""Logs a run: `log.jsonl` for programs, a progress line or plain lines on the screen, scalars for trackers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from scalekd.common import parallel
from scalekd.common.files import append_to, cannot_write
from scalekd.common.text import duration, printable

from .trackers import Tracker

OpenTrackers = Callable[
    [int, Callable[[str], None]], list[Tracker]
]  # (last step done, function that prints a line) -> trackers
SCALARS = ("lr", "grad_norm", "images_per_s", "data_share", "teacher_share")


class RunLog:
    """Writes events as JSON lines to `folder/log.jsonl` and in short form to the screen. Only rank 0 writes.

    open_trackers: called when training starts, and again if it returns to a checkpoint.
    Raises `UserError` when the log cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        console: Console | None = None,
        label: str = "",
        open_trackers: OpenTrackers | None = None,
    ):
        self.active = parallel.rank() == 0
        self.console = console or Console(emoji=False)
        self.label = label
        self.open_trackers, self.trackers = open_trackers, list[Tracker]()
        self.path = folder / "log.jsonl"
        try:
            # unbuffered: on a full disk the error is raised here, not at a later flush
            self.file = append_to(self.path) if self.active else None
            if self.active and self.path.read_bytes()[-1:] not in (b"", b"\n"):
                self._append("\n")  # a run that was killed may have left half a line
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self.live: Live | None = None
        self.last_line = 0.0
        self.accuracy = ""

    def event(self, kind: str, **values: Any) -> None:
        """Appends an event to log.jsonl."""
        self._append(json.dumps({"event": kind, "time": round(time.time(), 3)} | values) + "\n")

    def _append(self, text: str) -> None:
        rest = memoryview(text.encode())
        try:
            while self.file and rest:
                rest = rest[self.file.write(rest) or 0 :]
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def say(self, text: str) -> None:
        """Prints a line."""
        if self.active:
            self.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    def start(self, done: int, total: int) -> None:
        """Starts the progress line and the trackers after step `done`; called again on a return to a checkpoint."""
        if not self.active:
            return
        self._close_progress()
        if self.open_trackers:
            self.trackers = self.open_trackers(done, self.say)
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total} {task.fields[speed]}", markup=False),
            )
            self.task = self.progress.add_task(printable(self.label), total=total, completed=done, speed="")
            self.terms = Text()
            self.live = Live(Group(self.progress, self.terms), console=self.console, transient=True)
            self.live.start()

    def step(self, **values: Any) -> None:
        """Logs an interval.

        values: epoch, step, steps, lr, losses, grad_norm, images_per_s, data_share, left_s; teacher_share with a teacher;
            gradient_shares if they were measured.
        """
        self.event("step", **values)
        if not self.active:
            return
        scalars = {f"loss/{name}": value for name, value in values["losses"].items()}
        scalars |= {f"gradient/{name}": value for name, value in values.get("gradient_shares", {}).items()}
        self._track(values["step"], scalars | {name: values[name] for name in SCALARS if name in values})
        losses = "  ".join(f"{name} {value:.4f}" for name, value in values["losses"].items())
        teacher = f"teacher {values['teacher_share']:.0%}  " if "teacher_share" in values else ""
        speed = (
            f"{values['images_per_s']:.0f} img/s  data {values['data_share']:.0%}  "
            f"{teacher}{duration(values['left_s'])} left"
        )
        if self.live:
            self.progress.update(self.task, completed=values["step"], speed=speed)
            self.terms.plain = printable(f"  {losses}  {self.accuracy}")
        elif time.time() - self.last_line > 10:  # in a file, one line per interval would be too many
            self.last_line = time.time()
            self.say(f"{self.label} step {values['step']}/{values['steps']}  {losses}  {speed}")

    def validation(self, figures: Mapping[str, str], **values: Any) -> None:
        """Logs a validation.

        figures: key -> name of each metric in %. values: these metrics, step, steps, epoch, epochs, best, best_by, elapsed_s.
        """
        self.event("validation", **values)
        self._track(values["step"], {f"val/{name}": values[name] for name in (*figures, "loss") if name in values})
        metrics = [f"{name} {values[key]:.2f} %" for key, name in figures.items()]
        self.accuracy = metrics[0]
        best_by = "" if values["best_by"] == next(iter(figures)) else f"{figures[values['best_by']]} "
        unit = "epoch" if values["epoch"] == int(values["epoch"]) else "step"
        self.say(
            f"{self.label} {unit} {values[unit]}/{values[unit + 's']}  {'  '.join(metrics)}  best {best_by}{values['best']:.2f} %  "
            f"{duration(values['elapsed_s'])}"
        )

    def _track(self, step: int, values: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.scalars(step, values)

    def _close_progress(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None
        for tracker in self.trackers:
            tracker.close()
        self.trackers = []

    def close(self) -> None:
        self._close_progress()
        if self.file:
            self.file.close()
            self.file = None


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first. If a resumed run repeated a step, only the last repetition is returned.

    Skips a half-written line, which a killed run may leave.
    """
    events: list[dict[str, Any]] = []
    for line in (folder / "log.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            continue
        if not isinstance(event.get("step", 0), int | float):
            continue  # damaged
        if event["event"] == "resumed":
            events = [e for e in events if e["event"] != "finished" and e.get("step", 0) <= event.get("step", 0)]
        events.append(event)
    last = {(e["event"], e.get("step")): i for i, e in enumerate(events) if e["event"] in ("step", "validation")}
    return [e for i, e in enumerate(events) if last.get((e["event"], e.get("step")), i) == i]
