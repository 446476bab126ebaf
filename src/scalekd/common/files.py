"""Atomic writes of small files, a lock on a run's folder, and the errors if a file cannot be written.

Nothing is written through a link: a folder may come from someone else, and an archive can contain links.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GONE = (errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN)  # the disk went away or turned read-only
NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)  # from file systems that cannot flush
SCRATCH = ".part"  # ending of the names of unfinished files
LOCK = ".lock"


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

    Raises `UserError` if the file cannot be written.
    """
    try:
        with unfinished(path) as (scratch, file):
            yield file
            flush(file)
            os.replace(scratch, path)
    except OSError as error:
        raise cannot_write(path, error) from None


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """Yields a new file next to `path`, with its path, and removes it afterwards unless the block renamed it.

    Its name ends in `SCRATCH` and is always new, so an existing file or link of that name is never opened. A killed
    process may leave the file behind; `remove_unfinished` removes it. Raises `OSError`, also if `path` is a FIFO, a
    socket, a device, or a link to one: the file would take its place.
    """
    if kind := odd_kind(path):
        raise OSError(errno.EINVAL, f"it is {kind}, not a plain file", str(path))
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(4)}{SCRATCH}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield scratch, file
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def second_name(path: Path, name: Path) -> bool:
    """Makes `name` a hard link to `path`, in the same folder, and replaces what had this name.

    Returns False on a file system without hard links; then nothing has the name. Raises `UserError` if the folder is not
    writable.
    """
    scratch = name.with_name(f"{name.name}.{secrets.token_hex(4)}{SCRATCH}")
    try:
        try:
            os.link(path, scratch, follow_symlinks=False)
        except OSError:
            name.unlink(missing_ok=True)  # it would be another file than `path`
            return False
        os.replace(scratch, name)
        scratch.unlink(missing_ok=True)  # which is still there if `name` was this link already
        return True
    except OSError as error:
        raise cannot_write(name, error) from None


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left of unfinished files in `folder`, also links of such names."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f"*{SCRATCH}"):
            path.unlink(missing_ok=True)


def flush(file: IO[bytes]) -> None:
    """Flushes a file to disk, where its file system can do that. Raises `OSError`."""
    file.flush()
    _fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Flushes renames in `folder` to disk, where its file system can do that. Raises `OSError`."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        _fsync(handle)
    finally:
        os.close(handle)


def _fsync(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise


def append_to(path: Path) -> IO[bytes]:
    """Opens a file unbuffered for appending, and creates it if needed. Raises `OSError`, also for a link or a device."""
    # non-blocking, because opening a FIFO would wait for its reader
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a plain file", str(path))
    return os.fdopen(descriptor, "ab", buffering=0)


def read_bytes(path: str | Path, most: int) -> bytes:
    """The content of a plain file of at most `most` bytes.

    Raises `OSError`, also for a FIFO, a socket or a device, which could block or never end, and for a larger file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, f"it is {kind_of(found.st_mode)}, not a plain file", str(path))
        if found.st_size > most:
            raise OSError(
                errno.EFBIG, f"it has {found.st_size / 1e9:,.1f} GB, more than {most / 1e9:,.1f} GB", str(path)
            )
        return file.read()


def kind_of(mode: int) -> str:
    """What a file is that is neither a plain file nor a link, by the mode that `os.stat` gives."""
    kinds = {"a FIFO": stat.S_ISFIFO, "a socket": stat.S_ISSOCK, "a folder": stat.S_ISDIR}
    return next((name for name, is_it in kinds.items() if is_it(mode)), "a device")


def odd_kind(path: Path) -> str | None:
    """What `path`, or what it links to, is if it is neither a plain file nor a folder; None also if there is nothing."""
    with contextlib.suppress(OSError):
        mode = os.stat(path).st_mode
        return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else kind_of(mode)
    return None


def make_folder(folder: Path) -> None:
    """Creates `folder` and its parents, if needed. Raises `UserError` if that is not possible."""
    check_name(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None


def check_name(path: Path) -> None:
    """Raises `UserError` for a path that is not UTF-8: safetensors, JSON and HTML cannot hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"the name of {path} is not UTF-8; choose another folder with `out`, or rename it") from None


OTHERS = (
    "wandb",
)  # folders that another library keeps, with links out of them; scalekd reads and writes nothing there


def reject_links(folder: Path) -> None:
    """Raises `UserError` if a folder that may come from someone else has links out of it, FIFOs, sockets or devices.

    Such a link could make scalekd overwrite or publish a file outside. Links within the folder are fine, and so is a
    link to the folder. Does nothing if there is no such folder.
    """
    check_name(folder)
    root = os.path.realpath(folder)
    pending = [folder] if folder.is_dir() else []
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        _reject_outside(entry.path, root, folder)
                    elif entry.is_dir():
                        pending += [] if entry.name in OTHERS else [Path(entry.path)]
                    elif not entry.is_file():
                        kind = kind_of(entry.stat(follow_symlinks=False).st_mode)
                        raise UserError(f"{entry.path} is {kind}; remove it before you use {folder}")
        except OSError as error:
            raise UserError(f"cannot read {folder}: {error}") from None


def _reject_outside(link: str, root: str, folder: Path) -> None:
    target = os.path.realpath(link)
    if target != root and not target.startswith(root + os.sep):
        raise UserError(
            f"{link} is a link out of {folder}, to {target}. Files there could be overwritten or published; "
            "replace the link by the file itself, or remove it"
        )


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Creates `folder` and locks it until the block or this process ends. Raises `UserError` if it is locked.

    A killed launcher may leave its workers running; a second run in the same folder would corrupt the first. Removes
    the unfinished files of processes that were killed. Raises `UserError` for links out of the folder.
    """
    reject_links(folder)
    make_folder(folder)
    try:
        file = append_to(folder / LOCK)
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
        remove_unfinished(folder)
        yield


def is_locked(folder: Path) -> bool:
    """Whether another process holds the lock of `in_use`."""
    try:
        with os.fdopen(os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW), "rb+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # no run was there, or a file system without locks
        return False
    return False


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error for a failed write. Earlier files are intact, so that a run resumes from its last checkpoint."""
    if error.errno in FULL:
        remedy = "Files saved before are intact; free some space and run the same command again."
    elif error.errno in GONE:
        remedy = "Files saved before are intact; when the disk can be written again, run the same command again."
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = (
            "Raise the limit of open files (`ulimit -n 4096`), or lower data.workers, and run the same command again."
        )
    elif error.errno == errno.ELOOP:
        remedy = "It is a link, and scalekd writes through none; remove it or choose another folder."
    else:
        remedy = "Choose a folder that you can write to."
    return UserError(f"cannot write {path}: {error.strerror or error}. {remedy}")
