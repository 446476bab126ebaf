"""`log.jsonl`: logs of killed and resumed runs, full disks, and names with terminal escape codes."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from scalekd.common.errors import UserError
from scalekd.train.log import RunLog, read_log

STEP = {
    "epoch": 0.1,
    "steps": 9,
    "lr": 0.1,
    "images_per_s": 9.0,
    "data_share": 0.0,
    "teacher_share": 0.0,
    "left_s": 1.0,
}


def write(folder: Path, *events: dict[str, Any] | str) -> None:
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")


def step(at: int, loss: float = 1.0) -> dict[str, Any]:
    return {"event": "step", "step": at, "losses": {"ce": loss}}


def kinds(folder: Path) -> list[tuple[str, int | None]]:
    return [(e["event"], e.get("step")) for e in read_log(folder)]


def test_steps_after_a_checkpoint_are_seen_as_they_were_the_last_time(tmp_path):
    resumed = {"event": "resumed", "step": 3}
    validation = {"event": "validation", "step": 3}
    write(tmp_path, step(2), step(3), validation, step(4, 7.0), step(5), resumed, step(4, 8.0), resumed, step(4, 9.0))
    assert [e["losses"]["ce"] for e in read_log(tmp_path) if e.get("step") == 4] == [9.0]
    assert kinds(tmp_path) == [
        ("step", 2), ("step", 3), ("validation", 3), ("resumed", 3), ("resumed", 3), ("step", 4),
    ]  # fmt: skip


def test_a_run_that_ended_twice_is_seen_to_end_once(tmp_path):
    """Its checkpoint at the last step was there, its student was not: the end is logged again."""
    finished = {"event": "finished", "steps": 3}
    write(tmp_path, step(3), {"event": "validation", "step": 3}, finished, {"event": "resumed", "step": 3}, finished)
    assert kinds(tmp_path) == [("step", 3), ("validation", 3), ("resumed", 3), ("finished", None)]


def test_a_validation_that_was_repeated_at_its_checkpoint_is_seen_once(tmp_path):
    first, second = ({"event": "validation", "step": 3, "top1": top1} for top1 in (1.0, 2.0))
    write(tmp_path, step(3), first, {"event": "resumed", "step": 3}, second)
    assert [e["top1"] for e in read_log(tmp_path) if e["event"] == "validation"] == [2.0]


def test_lines_that_are_not_events_are_skipped(tmp_path):
    write(tmp_path, step(1), "", "17", '{"step": 2}', '{"event": "st', "\x00\ufffd", step(3))
    assert kinds(tmp_path) == [("step", 1), ("step", 3)]


def test_the_file_only_grows(tmp_path):
    write(tmp_path, step(1), step(2), '{"event": "step", "st')
    before = (tmp_path / "log.jsonl").read_bytes()
    log = RunLog(tmp_path, Console(file=io.StringIO()))
    log.event("resumed", step=1)
    log.start(1, 9)
    log.step(step=2, losses={"ce": 5.0}, **STEP)
    log.close()
    assert (tmp_path / "log.jsonl").read_bytes().startswith(before.removesuffix(b"\n"))
    assert [(e["event"], e["step"]) for e in read_log(tmp_path)] == [("step", 1), ("resumed", 1), ("step", 2)]
    assert read_log(tmp_path)[-1]["losses"] == {"ce": 5.0}


class FullDisk(io.RawIOBase):
    """Accepts `room` bytes, then raises the error of a full disk."""

    def __init__(self, room: int):
        self.room, self.held = room, b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        taken = bytes(data[: self.room - len(self.held)])
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.held += taken
        return len(taken)


def test_a_full_disk_is_reported(tmp_path):
    log = RunLog(tmp_path, Console(file=io.StringIO()))
    log.file = disk = FullDisk(100)
    with pytest.raises(UserError, match=r"cannot write .*log\.jsonl: No space left on device\. Files saved before"):
        for at in range(9):
            log.event("step", step=at)
    log.close()  # without another error
    assert len(disk.held) == 100


def test_a_log_that_cannot_be_opened_is_reported(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*log\.jsonl: Is a directory\. Choose a folder"):
        RunLog(tmp_path)


@pytest.mark.parametrize("terminal", [False, True])
def test_names_do_not_steer_the_terminal(tmp_path, terminal):
    bad = "[red]x[/] \x1b[2J\x1b]0;title\x07 \udcff [/]"
    out = io.StringIO()
    log = RunLog(tmp_path, Console(file=out, force_terminal=terminal, width=400, color_system=None), bad)
    log.say(f"says {bad}")
    log.start(0, 9)
    log.step(step=1, losses={bad: 1.0}, **STEP)
    log.validation(
        {"top1": "top-1", "top5": "top-5"},
        step=1,
        steps=9,
        epoch=1,
        epochs=2,
        top1=1.0,
        top5=1.0,
        loss=1.0,
        best=1.0,
        best_by="top1",
        elapsed_s=1.0,
    )
    log.close()
    shown = out.getvalue()
    assert r"says [red]x[/] \x1b[2J\x1b]0;title\x07 \udcff [/]" in shown
    assert "\x1b[2J" not in shown and "\x1b]0" not in shown and "\x07" not in shown and "\udcff" not in shown
    assert read_log(tmp_path)[0]["losses"] == {bad: 1.0}
    shown.encode()
