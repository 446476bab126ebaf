"""Writes and reads checkpoint files; a crash while writing leaves the previous file intact."""

from __future__ import annotations

import errno
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from scalekd.common.errors import UserError, first_line
from scalekd.common.files import cannot_write, flush, flush_folder, unfinished
from scalekd.common.out_of_memory import is_worker_death

FORMAT = 2


def save(path: Path, state: dict[str, Any], previous: Path | None = None) -> None:
    """Writes a temporary file, flushes it to disk and renames it: a reader sees the old file or the new one.

    previous: keep the old file under this name. A run that is killed between the two renames resumes from it.
    Raises `UserError` if the disk is full or the folder is not writable.
    """
    try:
        with unfinished(path) as (scratch, file):
            torch.save({"format": FORMAT} | state, file)
            flush(file)
            if previous and path.exists():
                os.replace(path, previous)
            os.replace(scratch, path)
        flush_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None
    except RuntimeError as error:
        if is_worker_death(error):  # raised by a signal handler, wherever this process is
            raise
        # torch.save reports a full disk as a RuntimeError
        raise cannot_write(path, OSError(errno.ENOSPC, f"is the disk full? {first_line(error)}")) from None


def load(path: Path) -> dict[str, Any]:
    """Reads tensors and plain values only, so no code in the file is run. Raises `UserError` for a damaged file."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not verify the checksums
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip or pickle can raise nearly anything
        raise UserError(
            f"{path} is damaged or not a checkpoint: {first_line(error)}\n"
            "Delete it to start this run from the beginning, or restore a copy."
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a checkpoint of this version of scalekd (format {FORMAT}).\n"
            "Resume with the version that wrote it, or delete it to start this run from the beginning."
        )
    return state
