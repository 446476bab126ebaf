"""The `scalekd` command, and `python -m scalekd`, which is what torchrun starts."""

from __future__ import annotations

import sys

from scalekd.common.stop import Stopped, StopRequest, ignore_signals


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
    return code


if __name__ == "__main__":
    sys.exit(main())
