"""A run's folder, whatever the task: opened, written, trained into, and left with what its task deploys."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.common.files import LOCK, in_use, write_text
from scalekd.common.sections import Section, to_yaml
from scalekd.common.shortages import explain_out_of_memory
from scalekd.common.stop import StopRequest

from .engine import train
from .log import RunLog
from .resume import recipe_difference
from .run import Run, provenance
from .trackers import open_trackers


class Outcome(NamedTuple):
    """What a task leaves in its run's folder beside log, checkpoints and summary."""

    card_file: str
    card: Callable[[Any], dict[str, Any]]  # of a run: how what is deployed is built and used, beside its weights
    finish: Callable[[Any, Path, dict[str, Any]], None]  # run, folder, summary: exports and reports; may add to summary


def run_into(
    folder: Path,
    run: Run,
    outcome: Outcome,
    console: Console,
    *,
    title: str,
    remedy: str,
    stop: StopRequest | None,
    beforehand: Collection[Path] = (),
) -> dict[str, Any]:
    """Trains to the end, or goes on with the run that is there. Returns its summary.

    remedy: what needs less memory. stop: looked at between steps; `Stopped` is raised with the run saved.
    beforehand: what the task wrote into the folder before the run.
    Raises `UserError`, also when the folder holds another or a finished run, or when another process trains in it.
    """
    config = run.config
    with in_use(folder) if parallel.rank() == 0 else contextlib.nullcontext():
        if parallel.rank() == 0:
            open_folder(folder, config, beforehand)  # once more: another process may have had it since
            write_folder(folder, run, outcome)
        parallel.wait_for_all()
        trackers = partial(open_trackers, config.track, folder, config.model_dump(mode="json"), config.name)
        log = RunLog(folder, console, title, trackers)
        try:
            with explain_out_of_memory(run.device, remedy + " That is another run: add --out with a new folder."):
                summary = train(run, folder, log, stop)
            for kind, values in run.notes().items():
                log.event(kind, **values)
        finally:
            log.close()
        if parallel.rank() == 0:
            outcome.finish(run, folder, summary)
            # last: it says that the run is finished
            write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def open_folder(folder: Path, config: Section, beforehand: Collection[Path] = ()) -> None:
    """Refuses a folder that holds something else, another recipe's run or a finished one. Writes nothing.

    beforehand: what the task writes into it before the run is there.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; give --out a folder")
        inside = list(folder.iterdir()) if folder.exists() else []
        # a run that ended at its very beginning leaves such files, or nothing
        if all(path.name.endswith(".part") or path.name == LOCK or path in beforehand for path in inside):
            _check_writable(folder)
            return
        recipe = folder / "recipe.yaml"
        if not recipe.is_file():
            raise UserError(f"{folder} is not empty and holds no run; give --out another folder")
        if difference := recipe_difference(recipe.read_text(), config):
            raise UserError(
                f"{folder} holds a run of another recipe (first difference: {difference}).\n"
                "Give --out another folder, or remove this one."
            )
        if (folder / "summary.json").is_file():
            raise UserError(
                f"{folder} holds this run, finished. Give --out another folder, or remove this one to run it again."
            )
        _check_writable(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot use {folder}: {error}. Give --out a folder that you may read and write.") from None


def _check_writable(folder: Path) -> None:
    """Told before the minutes of a pre-flight, not after."""
    there = next((p for p in (folder, *folder.absolute().parents) if p.exists()), folder)
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"cannot write to {folder}: no permission in {there}. Give --out a folder that you may write to."
        )


def write_folder(folder: Path, run: Run, outcome: Outcome) -> None:
    """The recipe first: it is what makes a folder a run's, wherever the rest is cut off."""
    write_text(folder / "recipe.yaml", to_yaml(run.config))
    made = provenance(run)
    file = folder / "provenance.json"
    with contextlib.suppress(OSError, ValueError):  # of a run that goes on: what made its first part is kept
        before = json.loads(file.read_text())
        made["before"] = [*before.pop("before", []), before]
    write_text(file, json.dumps(made, indent=2) + "\n")
    write_text(
        folder / outcome.card_file, json.dumps(outcome.card(run), indent=2) + "\n"
    )  # for an export before the end
