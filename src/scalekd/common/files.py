"""A run's small files, written whole or not at all; and what is told when they cannot be written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_file(path: Path) -> bool:
    """False also for what cannot be a path: Python 3.11 raises for a name that is too long."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8. Raises `UserError` when the disk is full or the folder cannot be written."""
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write into that takes the place of `path` at the end: a reader sees the old one or the new one.

    It is `path` with `.part` until then; a run that is killed may leave that behind, and nothing else.
    """
    scratch = path.with_name(path.name + ".part")
    try:
        with open(scratch, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """With what is above it; it may be there already. Raises `UserError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None


LOCK = ".lock"


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Makes `folder` and holds it until this process ends, in whatever way. Raises `UserError` if another one does.

    A launcher that is killed may leave its workers running; a second run beside them would spoil the first.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "ab")  # noqa: SIM115 - until the end
    except OSError as error:
        raise cannot_write(folder, error) from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: data workers would inherit that
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"another process is training in {folder}; wait for it, stop it, or give --out another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def cannot_write(path: Path, error: OSError) -> UserError:
    """What was written before stays, so that a run goes on from its last checkpoint."""
    remedy = (
        "What was saved before is untouched; free some space and start the same command again."
        if error.errno in FULL
        else "Give a folder that you may write to."
    )
    return UserError(f"cannot write {path}: {error.strerror or error}. {remedy}")
