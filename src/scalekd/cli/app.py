"""The command line: reads arguments, calls one function, turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from scalekd.common.errors import UserError
from scalekd.common.screen import Screen, lasting_screen
from scalekd.common.stop import Stopped, StopRequest
from scalekd.common.text import printable
from scalekd.common.version import __version__

from . import advise, analyze, compare, cost, deploy, evaluate, heads, lists, quantize, train, transfer
from .error_options import with_options
from .hints import Parser, key_hint

COMMANDS = (train, evaluate, deploy, quantize, advise, compare, heads, transfer, analyze, cost, lists)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code.

    0: success. 1: a check or a run failed. 2: an error in the input. 75: a scheduler stopped the run and may start the
    same command again. 129: the terminal was closed. 130: Ctrl-C.
    """
    with lasting_screen() as screen:
        stop = StopRequest(spoken=True)
        args = parse(argv)
        try:
            with stop:  # before the slow imports, so that signals are handled during them too
                code = args.run(args) or 0
        except UserError as error:
            text = with_options(str(error), args)
            print("\n".join(printable(line) for line in f"scalekd: {text}".split("\n")), file=sys.stderr)
            return 2
        except Stopped as stopped:
            print(f"scalekd: {stopped}", file=sys.stderr)
            return stopped.exit_code
        except KeyboardInterrupt:
            print(f"\nscalekd: {stop.unsaved()}", file=sys.stderr)
            return 130
        return code if hasattr(args, "folder_holds_result") else _written(screen, code)


def _written(screen: Screen | None, code: int) -> int:
    """The exit code of a command whose result is on standard output."""
    if screen is None:
        return code
    screen.flush()
    if code or screen.lost is None or isinstance(screen.lost, BrokenPipeError):  # `scalekd recipes | head`
        return code
    print(f"scalekd: cannot write to standard output: {screen.lost.strerror or screen.lost}", file=sys.stderr)
    return 2


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command line. Overrides (`key=value`) may come before, between and after the options."""
    command_line = parser()
    args, rest = command_line.parse_known_args(argv)  # argparse does not assign overrides that follow an option
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        takes_overrides = hasattr(args, "overrides")
        hint = key_hint(rest) if takes_overrides else ""
        unknown = [word for word in rest if not takes_overrides or word.startswith("-") or "=" not in word]
        command_line.error(
            f"unrecognized arguments: {' '.join(unknown)}; {hint}`scalekd COMMAND --help` lists the options"
        )
    if rest:
        args.overrides += rest
    return args


def parser() -> Parser:
    """The parser of all commands."""
    command_line = Parser(prog="scalekd", description="Distil vision transformers into small models.")
    command_line.add_argument("--version", action="version", version=f"scalekd {__version__}")
    commands = command_line.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in COMMANDS:
        group.add_commands(commands)
    return command_line
