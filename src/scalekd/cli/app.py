"""The command line: reads arguments, calls one function, turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from scalekd.common.errors import UserError
from scalekd.common.stop import Stopped
from scalekd.common.text import printable
from scalekd.common.version import __version__

from . import analyze, compare, cost, heads, lists, train, transfer
from .keys import with_options

COMMANDS = (train, compare, heads, transfer, analyze, cost, lists)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a failed check, 2 for a mistake of the user's, 75 for a run that a
    scheduler stopped and may start again, 130 for Ctrl-C."""
    args = parse(argv)
    try:
        return args.run(args) or 0
    except UserError as error:
        text = with_options(str(error), args)
        print("\n".join(printable(line) for line in f"scalekd: {text}".split("\n")), file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"scalekd: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("\nscalekd: stopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `scalekd recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads a command line; overrides may stand before, between and after the options."""
    command_line = parser()
    args, rest = command_line.parse_known_args(argv)  # argparse leaves over what follows an option
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        command_line.error(f"unrecognized arguments: {' '.join(rest)}; `scalekd COMMAND --help` lists the options")
    if rest:
        args.overrides += rest
    return args


def parser() -> argparse.ArgumentParser:
    command_line = argparse.ArgumentParser(prog="scalekd", description="Distil vision transformers into small models.")
    command_line.add_argument("--version", action="version", version=f"scalekd {__version__}")
    commands = command_line.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in COMMANDS:
        group.add_commands(commands)
    return command_line


if __name__ == "__main__":
    sys.exit(main())
