"""Opens a run's folder, trains into it and finishes it, for every task."""

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
from scalekd.common.files import LOCK, SCRATCH, in_use, reject_links, write_text
from scalekd.common.out_of_memory import explain_out_of_memory
from scalekd.common.sections import Section, to_yaml
from scalekd.common.stop import StopRequest, current
from scalekd.common.text import say
from scalekd.data.description import KEY, with_bad

from .engine import train
from .final_weights import use_exported
from .fingerprints import check_inputs, inputs_of, write_inputs
from .log import RunLog
from .resume import recipe_difference
from .run import Run, provenance
from .trackers import open_trackers


class Outcome(NamedTuple):
    """What a task adds to its run's folder, besides log, checkpoints and summary."""

    card_file: str
    card: Callable[[Any], dict[str, Any]]  # (run) -> the model card: how to build and use the deployed model
    finish: Callable[[Any, Path, dict[str, Any]], None]  # (run, folder, summary): exports, reports; may extend summary


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
    """Trains `run` to its end, or resumes it if `folder` holds its checkpoint. Returns its summary.

    Args:
        remedy: settings that need less memory, for an out-of-memory error.
        stop: checked between steps.
        beforehand: files and folders that the task wrote into `folder` before the run.

    Raises:
        Stopped: if `stop` was requested; the checkpoint is written.
        UserError: for an error in the run; if the folder holds another or a finished run; if another process uses it.
    """
    config, stop = run.config, stop or current()
    notices: list[str] = []
    with in_use(folder) if parallel.rank() == 0 else contextlib.nullcontext():
        if parallel.rank() == 0:
            open_folder(folder, config, beforehand)  # again, now locked: another process may have used it meanwhile
            inputs = inputs_of(run)
            notices = check_inputs(run, inputs, folder)
            write_folder(folder, run, outcome)
            write_inputs(inputs, folder)
        parallel.wait_for_all()
        trackers = partial(open_trackers, config.track, folder, config.model_dump(mode="json"), config.name)
        log = RunLog(folder, console, title, trackers)
        try:
            for notice in notices:
                log.event("notice", text=notice)
                log.say(f"{log.label} {notice}")
            with explain_out_of_memory(run.device, remedy + " This makes another run: choose a new folder with `out`."):
                summary = train(run, folder, log, stop)
            for kind, values in run.notes().items():
                log.event(kind, **values)
        finally:
            log.close()
        stop.at_once()  # the rest can be repeated from the last checkpoint
        if parallel.rank() == 0:
            say(console, use_exported(run, folder, summary))
            bad = {"training": run.train_images.bad, "validation": run.val_images.bad}
            summary[KEY] = with_bad(run.described, **bad)
            outcome.finish(run, folder, summary)
            stop.wait_for_step = True  # from here on the run is finished, and no signal may report anything else
            # last, because a folder with a summary counts as finished
            write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def open_folder(folder: Path, config: Section, beforehand: Collection[Path] = ()) -> None:
    """Raises `UserError` if `folder` cannot be used, or holds links, other files, another recipe's run or a finished run.

    Writes nothing. beforehand: files and folders that the task writes before the run.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; choose a folder with `out`")
        reject_links(folder)
        inside = list(folder.iterdir()) if folder.exists() else []
        # a run that failed before its first file leaves nothing else
        if all(path.name.endswith(SCRATCH) or path.name == LOCK or path in beforehand for path in inside):
            _check_writable(folder)
            return
        recipe = folder / "recipe.yaml"
        if not recipe.is_file():
            raise UserError(f"{folder} is not empty and holds no run; choose another folder with `out`")
        if difference := recipe_difference(recipe.read_text(), config):
            raise UserError(
                f"{folder} holds a run of another recipe (first difference: {difference}).\n"
                "Choose another folder with `out`, or remove this one."
            )
        if (folder / "summary.json").is_file():
            raise UserError(
                f"{folder} holds this run, and it is finished.\n"
                "Choose another folder with `out`, or remove this one to run it again."
            )
        _check_writable(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot use {folder}: {error}. Choose a folder with `out` that you can read and write."
        ) from None


def _check_writable(folder: Path) -> None:
    """Raises `UserError` now rather than after a pre-flight of minutes."""
    existing = next((p for p in (folder, *folder.absolute().parents) if p.exists()), folder)
    if existing.is_dir() and not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"cannot write to {folder}: no permission in {existing}. Choose a folder with `out` that you can write to."
        )


def write_folder(folder: Path, run: Run, outcome: Outcome) -> None:
    """Writes recipe, provenance and model card."""
    # the recipe first: a folder with a recipe counts as a run's, even if the process is killed in between
    write_text(folder / "recipe.yaml", to_yaml(run.config))
    made = provenance(run)
    file = folder / "provenance.json"
    with contextlib.suppress(OSError, ValueError):  # a resumed run keeps the provenance of its earlier parts
        before = json.loads(file.read_text())
        made["before"] = [*before.pop("before", []), before]
    write_text(file, json.dumps(made, indent=2) + "\n")
    # already now, so that an unfinished run can be exported
    write_text(folder / outcome.card_file, json.dumps(outcome.card(run), indent=2) + "\n")
