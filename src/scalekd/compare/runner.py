"""Runs the jobs of a comparison, several at a time, each in its own process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
from rich.console import Console

from scalekd.common.errors import UserError
from scalekd.common.files import append_to, is_locked
from scalekd.common.parallel import pick_device
from scalekd.common.processor import asked_threads, cores
from scalekd.common.stop import Stopped, StopRequest

from .ladder import Job

FINISHED, FAILED, STOPPED = 0, 1, 75
LEFTOVER = 300.0  # seconds to wait for a run of a comparison that was killed, which saves and ends
SERVER = multiprocessing.get_context("forkserver")  # processes start with torch already imported, in no other state


@dataclass(frozen=True)
class Place:
    """The device of a run."""

    device: str
    threads: int  # of the CPU


def places(jobs: int | None, device: str | None) -> list[Place]:
    """One place for each of `jobs` simultaneous runs.

    By default one per GPU, or one per CPU core, as small models gain little from more cores. On a CPU a run gets the
    threads that OMP_NUM_THREADS asks for, and else its share of the cores. Raises `UserError` if `jobs` is below 1.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"`jobs` {jobs}: must be 1 or more")
    kind = pick_device(device)
    asked = asked_threads()
    if kind.type != "cuda":
        count = jobs or max(1, cores() // (asked or 1))
        return [Place("cpu", asked or max(1, cores() // count))] * count
    gpus = [str(kind)] if device and ":" in device else [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    count = jobs or len(gpus)
    return [Place(gpus[i % len(gpus)], asked or max(1, cores() // count)) for i in range(count)]


def run_all(
    jobs: Sequence[Job],
    folder_of: Callable[[Job], Path],
    outputs: Path | None,
    also: Sequence[str],
    places: Sequence[Place],
    ended: Callable[[Job, int], None],
    show: Callable[[dict[Job, float]], None],
    stop: StopRequest,
) -> None:
    """Runs every job, one at a time on each place. Raises `Stopped` after all running jobs saved a checkpoint.

    Args:
        folder_of: the folder of a job's run.
        outputs: a folder where the runs of a seed share their teacher's outputs, or None.
        also: the losses of all runs that share them, so that the first pass stores what each of them needs.
        ended: called with a job and its exit code when it ends.
        show: called about every second with the running jobs and when they started, by `time.monotonic`.
    """
    SERVER.set_forkserver_preload(["scalekd.compare.runner", "scalekd.runs.distillation", "timm"])
    waiting, free = list(jobs), list(places)
    running: dict[Job, tuple[ForkServerProcess, Place, float]] = {}
    checked = {(job.student, job.method): job for job in reversed(jobs)}  # the first run of each pair gets a pre-flight
    try:
        while waiting or running:
            while waiting and free and not stop.number:
                job, place = waiting.pop(0), free.pop(0)
                check = checked[job.student, job.method] is job
                process = SERVER.Process(target=_run, args=(job, folder_of(job), outputs, also, place, check))
                process.start()
                running[job] = process, place, time.monotonic()
            for job, (process, place, _) in list(running.items()):
                process.join(timeout=1 / len(running))
                if process.exitcode is not None:
                    del running[job]
                    free.append(place)
                    ended(job, process.exitcode)
            if stop.number:
                break
            show({job: since for job, (_, _, since) in running.items()})
    finally:
        for process, _, _ in running.values():
            process.terminate()  # SIGTERM: the run saves a checkpoint and ends
        unfinished = []
        for job, (process, _, _) in running.items():
            process.join()
            unfinished += [job] * (process.exitcode != FINISHED)
            ended(job, FINISHED if process.exitcode == FINISHED else STOPPED)
    if stop.number:
        done = len(jobs) - len(waiting) - len(unfinished)
        where = f"after {done} of {len(jobs)} runs"
        raise Stopped(stop.number, None, where + f" (saved: {len(unfinished)} more)" * bool(unfinished))


def _run(job: Job, folder: Path, outputs: Path | None, also: Sequence[str], place: Place, check: bool) -> None:
    """The main function of a run's process. Its output goes to FOLDER.log next to the run's folder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent sends SIGTERM
    log = folder.with_name(folder.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with append_to(log) as screen:
        os.dup2(screen.fileno(), sys.stdout.fileno())
        os.dup2(screen.fileno(), sys.stderr.fileno())
        threading.Thread(target=_stop_with_parent, daemon=True).start()
        sys.exit(_exit_code(job, folder, outputs, also, place, check))


def _stop_with_parent() -> None:
    """Ends this run, with a checkpoint, when the comparison that started it has been killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _wait_for_leftover(folder: Path) -> None:
    """Waits while a run of a comparison that was killed saves its checkpoint in `folder`."""
    end = time.monotonic() + LEFTOVER
    while is_locked(folder) and time.monotonic() < end:
        time.sleep(0.2)


def _exit_code(job: Job, folder: Path, outputs: Path | None, also: Sequence[str], place: Place, check: bool) -> int:
    """Trains `job` in this process; prints an error instead of raising it."""
    from scalekd.runs.distillation import execute

    torch.set_num_threads(place.threads)
    if place.device != "cpu":
        torch.cuda.set_device(place.device)
    console = Console(file=sys.stdout, width=120, emoji=False)
    try:
        with StopRequest() as stop:
            _wait_for_leftover(folder)
            execute(
                job.config,
                folder,
                torch.device(place.device),
                console,
                check=check and not folder.exists(),
                title=str(job),
                stop=stop,
                teacher_outputs=outputs,
                outputs_for=also,
                look=False,
            )
        return FINISHED
    except Stopped:
        return STOPPED
    except UserError as error:
        print(f"scalekd: {error}", flush=True)
    except Exception:
        traceback.print_exc()
    return FAILED
