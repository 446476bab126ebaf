"""Exit codes of signals, and their answer until `stop.py` takes over. Imports as little as possible: it comes first."""

from __future__ import annotations

import os
import signal
import sys

REQUEUE = 75  # EX_TEMPFAIL: run the same command again
EXIT_CODES = {signal.SIGTERM: REQUEUE, signal.SIGUSR1: REQUEUE, signal.SIGINT: 130, signal.SIGHUP: 129}


def runs_as_command() -> bool:
    """Whether this process is the `scalekd` command or `python -m scalekd`, while its modules are being imported."""
    if sys.argv[:1] == ["-m"]:
        return any(word in ("scalekd", "-mscalekd") for word in sys.orig_argv)
    return os.path.basename((sys.argv or [""])[0]) in ("scalekd", "scalekd.exe")


def answer_at_once() -> None:
    """From here on signals end the process with their exit codes. Nothing has to be saved or cleaned up yet."""
    for number in EXIT_CODES:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under `nohup`
            signal.signal(number, _end)


def _end(number: int, frame: object) -> None:
    text = f"\nscalekd: stopped by {signal.Signals(number).name}; run the same command again\n"
    try:
        os.write(2, text.encode())
    finally:  # also if the screen is gone
        os._exit(EXIT_CODES[signal.Signals(number)])
