"""Atomic writes of small files, a lock on a run's folder, and the errors if a file cannot be written."""

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
    """Like `path.is_file()`, but False for an invalid path: Python 3.11 raises for a name that is too long."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, atomically. Raises `UserError` if the disk is full or the folder is not writable."""
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yields a binary file that replaces `path` when the block ends: a reader sees the old file or the new one.

    Until then its name is `path` with `.part` appended; a killed process may leave that file behind, and no other.
    Raises `UserError` if the file cannot be written.
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
    """Creates `folder` and its parents, if needed. Raises `UserError` if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None


LOCK = ".lock"


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Creates `folder` and locks it until the block or this process ends. Raises `UserError` if it is locked.

    A killed launcher may leave its workers running; a second run in the same folder would corrupt the first.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "ab")  # noqa: SIM115 - open until the block ends
    except OSError as error:
        raise cannot_write(folder, error) from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: data workers would inherit the lock
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"another process is training in {folder}; wait for it, stop it, or choose another folder with `out`"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def is_locked(folder: Path) -> bool:
    """Whether another process holds the lock of `in_use`."""
    try:
        with open(folder / LOCK, "ab") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # no such folder, or a file system without locks
        return False
    return False


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error for a failed write. Earlier files are intact, so that a run resumes from its last checkpoint."""
    remedy = (
        "Files saved before are intact; free some space and run the same command again."
        if error.errno in FULL
        else "Choose a folder that you can write to."
    )
    return UserError(f"cannot write {path}: {error.strerror or error}. {remedy}")
