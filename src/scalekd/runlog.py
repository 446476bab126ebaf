"""What a run tells: `log.jsonl` for programs, a progress line or plain lines for people."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from . import parallel


class RunLog:
    """Events as JSON lines in `folder/log.jsonl`, and their short form on the screen. Only rank 0 writes."""

    def __init__(self, folder: Path, console: Console | None = None, label: str = ""):
        self.active = parallel.rank() == 0
        self.console = console or Console()
        self.label = label
        if self.active:
            _end_last_line(folder / "log.jsonl")
        self.file = open(folder / "log.jsonl", "a", encoding="utf-8") if self.active else None  # noqa: SIM115 - until close()
        self.live: Live | None = None
        self.last_line = 0.0
        self.accuracy = ""

    def event(self, kind: str, **values: Any) -> None:
        if self.file:
            self.file.write(json.dumps({"event": kind, "time": round(time.time(), 3)} | values) + "\n")
            self.file.flush()

    def say(self, text: str) -> None:
        if self.active:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, done: int, total: int) -> None:
        if self.active and self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total} {task.fields[speed]}"),
            )
            self.task = self.progress.add_task(self.label, total=total, completed=done, speed="")
            self.terms = Text()
            self.live = Live(Group(self.progress, self.terms), console=self.console, transient=True)
            self.live.start()

    def step(self, **values: Any) -> None:
        """One log interval: epoch, step, steps, lr, losses, images_per_s, data_share, teacher_share, left_s."""
        self.event("step", **values)
        if not self.active:
            return
        losses = "  ".join(f"{name} {value:.4f}" for name, value in values["losses"].items())
        speed = (
            f"{values['images_per_s']:.0f} img/s  data {values['data_share']:.0%}  "
            f"teacher {values['teacher_share']:.0%}  {duration(values['left_s'])} left"
        )
        if self.live:
            self.progress.update(self.task, completed=values["step"], speed=speed)
            self.terms.plain = f"  {losses}  {self.accuracy}"
        elif time.time() - self.last_line > 10:  # a log file wants a line now and then, not every interval
            self.last_line = time.time()
            self.say(f"{self.label} step {values['step']}/{values['steps']}  {losses}  {speed}")

    def validation(self, **values: Any) -> None:
        self.event("validation", **values)
        self.accuracy = f"top-1 {values['top1']:.2f} %"
        self.say(
            f"{self.label} epoch {values['epoch']}/{values['epochs']}  top-1 {values['top1']:.2f} %  "
            f"top-5 {values['top5']:.2f} %  best {values['best']:.2f} %  {duration(values['elapsed_s'])}"
        )

    def close(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None
        if self.file:
            self.file.close()
            self.file = None


def _end_last_line(path: Path) -> None:
    """A run that was killed may have left half a line; the next event goes on a line of its own."""
    if path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n"):
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; a half-written last line is left out."""
    events = []
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def duration(seconds: float) -> str:
    """41 -> '41 s', 3700 -> '1 h 02 min'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
