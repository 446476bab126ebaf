"""Stopping on request: SIGTERM and SIGUSR1 (a scheduler's) and Ctrl-C end a run after the step at hand, saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

REQUEUE = 75  # EX_TEMPFAIL: start the same command again
EXIT_CODES = {signal.SIGTERM: REQUEUE, signal.SIGUSR1: REQUEUE, signal.SIGINT: 130}


class Stopped(Exception):
    """A run ended because it was asked to; the same command goes on from its checkpoint."""

    def __init__(self, number: int, step: int | None):
        name = signal.Signals(number).name
        where = "before the first step" if not step else f"after step {step}, saved"
        super().__init__(f"stopped by {name} {where}; the same command goes on from there")
        self.exit_code = EXIT_CODES[signal.Signals(number)]


class StopRequest:
    """While entered, the signals above raise `Stopped` at once, or, once `wait_for_step` is set, only set `number`.

    Whoever trains then looks at `number` between steps. A second Ctrl-C does not wait.
    Outside the main thread no signal can be caught; nothing is changed there.
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
    """For data loader workers: a signal to the whole process group must not take them away in the middle of a step.

    Their parent ends them. Should it not come to that, SIGTERM still does, five minutes later.
    """
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(300) and None)
