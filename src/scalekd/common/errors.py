"""`UserError`, for problems that the user can fix, and suggestions for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A problem that the user can fix: what is wrong, where, and how to fix it, in one or two lines.

    The command line prints it without a traceback and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of another library's error, at most 300 characters, to quote in a `UserError`."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def nearest(name: str, valid: Iterable[str]) -> str:
    """' Did you mean `x`?' for the closest valid names, else the list of valid names if there are at most 25, else ''."""
    names = sorted(valid)
    few = f" Valid: {', '.join(names)}." if 0 < len(names) <= 25 else ""
    return did_you_mean(name, names) or few


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """' Did you mean `x`?' for up to three close valid names, or '' if none is close."""
    close = difflib.get_close_matches(name[:100], sorted(valid), n=3, cutoff=0.6)
    return " Did you mean " + " or ".join(f"`{c}`" for c in close) + "?" if close else ""
