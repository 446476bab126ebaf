"""Handles SIGTERM, SIGUSR1 (from a scheduler) and Ctrl-C: the run finishes its step, saves and stops."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

REQUEUE = 75  # EX_TEMPFAIL: run the same command again
EXIT_CODES = {signal.SIGTERM: REQUEUE, signal.SIGUSR1: REQUEUE, signal.SIGINT: 130}


class Stopped(Exception):
    """A signal stopped the run; the same command resumes it from its checkpoint. `exit_code` is for the command line."""

    def __init__(self, number: int, step: int | None, where: str = ""):
        name = signal.Signals(number).name
        where = where or ("before the first step" if not step else f"after step {step} (saved)")
        super().__init__(f"stopped by {name} {where}; run the same command again to resume")
        self.exit_code = EXIT_CODES[signal.Signals(number)]


class StopRequest:
    """A context in which the signals of `EXIT_CODES` raise `Stopped`, or only set `number` if `wait_for_step` is set.

    The training loop checks `number` between steps. A second Ctrl-C raises KeyboardInterrupt at once.
    Outside the main thread Python cannot handle signals, so the context does nothing there.
    """

    def __init__(self) -> None:
        self.number = 0
        self.wait_for_step = False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in EXIT_CODES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.wait_for_step:
            raise Stopped(number, None)
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


def leave_signals_to_parent(worker: int = 0) -> None:
    """Makes a data loader worker ignore the signals: one sent to the process group must not kill it during a step.

    The parent stops its workers. If it does not, SIGTERM still ends the worker after five minutes.
    """
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(300) and None)
