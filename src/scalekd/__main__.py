"""The `scalekd` command, and `python -m scalekd`, which is what torchrun starts."""

from __future__ import annotations

import os
import sys
import threading
import time

from scalekd.common.stop import Stopped, StopRequest, ignore_signals

PATIENCE = 20.0  # seconds


def main() -> int:
    """Runs a command and returns its exit code. A signal counts from here to the end of the process."""
    try:
        with StopRequest() as stop:
            from scalekd.cli.app import main as command

            code = command()
            stop.finish()
    except Stopped as stopped:
        print(f"scalekd: {stopped}", file=sys.stderr)
        code = stopped.exit_code
    ignore_signals()
    if code:
        threading.Thread(target=_end, args=(code,), daemon=True).start()
    return code


def _end(code: int) -> None:
    """Ends a failed command whose libraries hang while Python ends, such as for want of open files."""
    time.sleep(PATIENCE)
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
