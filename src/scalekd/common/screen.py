"""Standard output and error that survive a closed pipe, a closed terminal and a full disk."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Screen:
    """A text stream that drops everything after its first failed write; `lost` is the error."""

    def __init__(self, stream: TextIO):
        self.stream, self.lost = stream, None if not stream.closed else OSError("it is closed")

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Any) -> None:
        if self.lost is not None:
            return
        try:
            action()
        except OSError as error:
            self.lost = error
            with contextlib.suppress(OSError, ValueError):  # or Python fails again at its exit, on what is buffered
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def lasting_screen() -> Iterator[Screen | None]:
    """Replaces sys.stdout and sys.stderr by `Screen`s in this context. Yields that of stdout; None if there is none."""
    before = sys.stdout, sys.stderr
    # without a console they are None, and `print` does nothing
    out, err = (None if stream is None else Screen(stream) for stream in before)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        for screen in (out, err):
            if screen is not None:
                screen.flush()
        sys.stdout, sys.stderr = before
