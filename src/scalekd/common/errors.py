"""Mistakes that a person can mend: printed without a trace, exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """One or two lines: what is wrong, where, and the way out."""


def first_line(error: BaseException) -> str:
    """What another library says of a failure, short enough to stand in a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def nearest(name: str, valid: Iterable[str]) -> str:
    """' Did you mean `x`?' for the closest valid name, or the names if there are few, or ''."""
    names = sorted(valid)
    few = f" Valid: {', '.join(names)}." if 0 < len(names) <= 25 else ""
    return did_you_mean(name, names) or few


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """' Did you mean `x`?', or '' where no valid name is close."""
    close = difflib.get_close_matches(name[:100], sorted(valid), n=3, cutoff=0.6)
    return " Did you mean " + " or ".join(f"`{c}`" for c in close) + "?" if close else ""
