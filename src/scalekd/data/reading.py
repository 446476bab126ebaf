"""Reads files, and tells a fault of one file from an outage of the disk, the share or this machine."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from typing import TypeVar

from scalekd.common.errors import UserError
from scalekd.common.stop import Stopped, current
from scalekd.common.text import printable

WAITS = (1, 2, 4, 8, 15)  # seconds before each new try during an outage

# what the system says of a single file; everything else is an outage
OF_THE_FILE = {
    errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG,
    errno.EINVAL, errno.ENXIO, errno.EFBIG,
}  # fmt: skip
T = TypeVar("T")


class Outage(UserError):
    """Files cannot be read for a reason of the system, not of one file."""


def steadily(read: Callable[[], T], path: str, alone: bool = True) -> T:
    """`read()`. During an outage, it is tried again for half a minute.

    path: the file that is read. alone: it holds one image; if it holds many, any fault is an outage.

    Raises:
        OSError: for a fault of the file.
        Outage: if the outage lasts.
        Stopped: if a signal arrived during an outage.
    """
    for wait in (*WAITS, None):
        try:
            return read()
        except OSError as error:
            if error.errno is None or (alone and _of_the_file(error, path)):
                raise
            if wait is None:
                reason = f"{error.strerror or error}, for {sum(WAITS)} s"
                raise Outage(f"cannot read {printable(path)}: {reason}.\n{_remedy(error, path)}") from None
        end = time.monotonic() + wait
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))
            if number := current().number:
                raise Stopped(number, current().saved)
    raise AssertionError


def _of_the_file(error: OSError, path: str) -> bool:
    """Whether other files next to `path` can be expected to be readable."""
    if error.errno not in OF_THE_FILE:
        return False
    with contextlib.suppress(OSError):  # of a share that is no longer mounted, the folder is gone or empty
        with os.scandir(os.path.dirname(path) or ".") as entries:
            return any(entries)
    return False


def _remedy(error: OSError, path: str) -> str:
    again = "then run the same command again."
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"Raise the limit of open files (`ulimit -n 4096`) or lower data.workers, {again}"
    if error.errno == errno.ENOMEM:
        return f"Free memory or lower data.workers, {again}"
    return (
        f"The image may be fine. Check that the disk or share of {printable(os.path.dirname(path))} is mounted, {again}"
    )
