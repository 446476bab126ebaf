"""The teacher's outputs that the runs of a comparison share on disk: what they hold, and when they are removed."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.console import Console

from scalekd.common.text import say
from scalekd.distill.teacher_outputs import SUFFIX

from .ladder import Job


class Outputs:
    """The folder OUT/outputs. planned: the runs of this call. later: runs of the ladder that another call would start."""

    def __init__(self, out: Path, planned: Sequence[Job], later: Sequence[Job]):
        self.folder, self.planned, self.later = out / "outputs", planned, later
        self.losses = list(dict.fromkeys(loss for job in planned for loss in job.config.losses))

    def remove_done(self, seed: int, done: Collection[Job]) -> None:
        """Removes the outputs of a seed if all its runs are done, those of later calls too."""
        if not any(job.seed == seed and job not in done for job in (*self.planned, *self.later)):
            for file in self.folder.glob(f"seed-{seed}-*{SUFFIX}"):
                file.unlink(missing_ok=True)

    def finish(self, console: Console) -> None:
        """Removes the folder after the last run; outputs that later runs of the ladder would use stay, with a message."""
        seeds = {job.seed for job in self.later}
        if not any(file for seed in seeds for file in self.folder.glob(f"seed-{seed}-*{SUFFIX}")):
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        gigabytes = sum(file.stat().st_blocks * 512 for file in self.folder.glob(f"*{SUFFIX}")) / 1e9
        say(
            console,
            f"{self.folder} keeps the teacher's outputs ({gigabytes:.1f} GB) for the ladder's other {len(self.later)} runs; "
            "remove it if you will not start them",
        )
