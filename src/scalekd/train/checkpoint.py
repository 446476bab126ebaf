"""What a run needs to go on, in one file, written so that a crash leaves an old one whole."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from scalekd.common.errors import UserError, first_line

FORMAT = 2


def save(path: Path, state: dict[str, Any], previous: Path | None = None) -> None:
    """Writes beside `path`, flushes to the disk, then renames: a reader sees the old file or the new one.

    previous: where the old file goes. A run that is killed between the two renames finds it there.
    Raises `UserError` when the disk is full or the folder cannot be written.
    """
    scratch = path.with_name(path.name + ".part")
    try:
        with open(scratch, "wb") as file:
            torch.save({"format": FORMAT} | state, file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(scratch, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch's writer tells a full disk only as a RuntimeError
        reason = f"is the disk full? {first_line(error)}" if isinstance(error, RuntimeError) else first_line(error)
        raise UserError(
            f"cannot write {path}: {reason}. What was saved before is untouched; "
            "free some space and start the same command again."
        ) from None
    finally:
        scratch.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Renames reach the disk with their folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: Path) -> dict[str, Any]:
    """Reads tensors and plain values only: no code from the file is run. Raises `UserError` for a damaged file."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged:
            raise ValueError(f"{damaged} in it has changed since it was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip or pickle can raise nearly anything
        raise UserError(
            f"{path} is not a whole checkpoint: {first_line(error)}\nRemove it to start this run anew, or put back a copy."
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of this version (format {FORMAT})")
    return state
