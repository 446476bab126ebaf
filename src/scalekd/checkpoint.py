"""What a run needs to go on, in one file, written so that a crash leaves the old one whole."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from .errors import UserError, first_line

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes beside `path`, flushes to the disk, then renames: a reader sees the old file or the new one.

    Raises `UserError` when the disk is full or the folder cannot be written.
    """
    scratch = path.with_name(path.name + ".part")
    try:
        with open(scratch, "wb") as file:
            torch.save({"format": FORMAT} | state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot write {path}: {error}. What was saved before is untouched; "
            "free some space and start the same command again."
        ) from None
    finally:
        scratch.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Reads tensors and plain values only: no code from the file is run. Raises `UserError` for a damaged file."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged:
            raise ValueError(f"{damaged} in it has changed since it was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is not a whole checkpoint: {first_line(error)}\nRemove it to start this run anew, or put back a copy."
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of this version (format {FORMAT})")
    return state
