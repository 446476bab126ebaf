"""Handles SIGTERM, SIGUSR1, SIGHUP and Ctrl-C: a run finishes its step, saves and stops; anything else stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from .early_signals import EXIT_CODES

PATIENCE = 5.0  # seconds until a process that must stop at once, but hangs in a library, is ended


class Stopped(BaseException):
    """A signal stopped the run; the same command resumes it from its checkpoint. `exit_code` is for the command line.

    Not an `Exception`: code that turns the errors of a library into messages must not catch it.

    step: the last step, which was saved; 0: the run had not made a step; None: there is no run yet.
    """

    def __init__(self, number: int, step: int | None, where: str = ""):
        name = signal.Signals(number).name
        saved = "" if step is None else f" after step {step} (saved)" if step else " before the first step"
        text = f" {where}" if where else saved
        super().__init__(f"stopped by {name}{text}; run the same command again" + " to resume" * bool(step or where))
        self.exit_code = EXIT_CODES[signal.Signals(number)]


class StopRequest:
    """A context in which the signals of `EXIT_CODES` raise `Stopped`, or only set `number` if `wait_for_step` is set.

    The training loop checks `number` between steps. A second Ctrl-C raises KeyboardInterrupt at once. If a library
    catches `Stopped`, it is raised again at the end of the context, or by `at_once`. SIGHUP keeps being ignored under
    `nohup`. Outside the main thread Python cannot handle signals, so the context does nothing there.

    Args:
        spoken: say on stderr that a signal arrived, even while the main thread is busy in a library, and end the
            process if it has to stop at once but does not do so within `PATIENCE` seconds. For the command line.

    Attributes:
        saved: the step of the run's newest checkpoint, 0 if it has none; None if there is no run.
    """

    def __init__(self, spoken: bool = False) -> None:
        self.number = 0
        self.wait_for_step = False
        self.saved: int | None = None
        self.spoken = spoken
        self.before: dict[signal.Signals, Any] = {}
        self.raised = 0.0  # when `Stopped` was raised last, by time.monotonic
        self.outer: StopRequest | None = None
        self.listener: _Listener | None = None

    def __enter__(self) -> StopRequest:
        global _current
        if threading.current_thread() is threading.main_thread():
            caught = [n for n in EXIT_CODES if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._note) for number in caught}
            self.outer, _current = _current, self
            if self.spoken:
                self.listener = _Listener(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        if self.listener:
            self.listener.close()
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.before:
            _current = self.outer
        if self.raised and not isinstance(error, (Stopped, KeyboardInterrupt)):
            raise Stopped(self.number, self.saved) from None  # a library caught it, or turned it into its own error

    def begin(self) -> None:
        """A run is set up: until it trains, signals raise `Stopped` at once. Raises it if one arrived before."""
        self.saved = 0
        self.at_once()

    def at_once(self) -> None:
        """From now on signals raise `Stopped` at once. Raises it if one arrived before."""
        self.wait_for_step = False
        if self.number:
            raise Stopped(self.number, self.saved)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT == self.number
        self.number = number
        if self.wait_for_step:
            if again:
                raise KeyboardInterrupt
        elif time.monotonic() - self.raised > 1:  # a second signal must not cut off the ending
            self.raised = time.monotonic()
            raise Stopped(number, self.saved)

    def finish(self) -> None:
        """The command is done: from here on signals are ignored, also after the context."""
        if self.before:
            ignore_signals()
            self.before = dict.fromkeys(self.before, signal.SIG_IGN)

    def unsaved(self) -> str:
        """What to say after a KeyboardInterrupt, which does not save."""
        if self.saved is None:
            return "stopped by Ctrl-C"
        if self.saved:
            return f"stopped by Ctrl-C without saving; the same command resumes from step {self.saved}"
        return "stopped by Ctrl-C without saving; there is no checkpoint yet, so the same command starts from the beginning"


_current: StopRequest | None = None


def current() -> StopRequest:
    """The innermost `StopRequest` that is entered; a new one, which hears nothing, if there is none."""
    return _current or StopRequest()


class _Listener(threading.Thread):
    """Reads signals as they arrive. The handler of `StopRequest` runs only when the main thread is back in Python."""

    def __init__(self, request: StopRequest):
        super().__init__(daemon=True)
        self.request, self.heard, self.closed = request, list[int](), threading.Event()
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.before = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.start()

    def close(self) -> None:
        self.closed.set()
        signal.set_wakeup_fd(self.before)
        os.write(self.writer, b"\0")  # closing is not enough: forked processes hold the pipe open
        self.join()
        os.close(self.writer)
        os.close(self.reader)

    def run(self) -> None:
        while True:
            for number in os.read(self.reader, 64):
                if not number:
                    return
                if number in EXIT_CODES:
                    self._hear(number)

    def _hear(self, number: int) -> None:
        again = number == signal.SIGINT and number in self.heard
        self.heard.append(number)
        name = signal.Signals(number).name
        if self.request.wait_for_step and not again:
            hint = "; Ctrl-C again stops without saving" * (number == signal.SIGINT)
            _tell(f"scalekd: {name} received: finishing this step and saving{hint}")
            return
        if again or len(self.heard) == 1:
            _tell(f"scalekd: {name} received: stopping now")
        if not self.closed.wait(PATIENCE) and (again or not self.request.wait_for_step):
            _tell(f"scalekd: {Stopped(number, self.request.saved)}")
            os._exit(EXIT_CODES[signal.Signals(number)])


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # the screen may be gone
        os.write(2, f"\n{text}\n".encode())


def _forget_parent() -> None:
    """In a forked process: its signals are not those of the parent's listener."""
    with contextlib.suppress(ValueError):  # forked from another thread
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_parent)


def ignore_signals() -> None:
    """For a command that is done: a signal must not change its exit code while Python ends."""
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)


def leave_signals_to_parent(worker: int = 0) -> None:
    """Makes a data loader worker ignore the signals: one sent to the process group must not kill it during a step.

    The parent stops its workers. If it does not, SIGTERM still ends the worker after five minutes.
    """
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(300) and None)
