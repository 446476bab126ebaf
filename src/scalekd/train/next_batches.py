"""Fetches batches so that all processes of a run stop after the same step, whatever happens to one of them."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

from scalekd.common import parallel
from scalekd.common.errors import UserError
from scalekd.common.stop import Stopped, StopRequest
from scalekd.data.images import BadImages


class Fetched(NamedTuple):
    """The batches of one step, or why this process has none."""

    batches: list[Any]
    failure: Exception | None = None


def fetch(batches: Iterator[Any], count: int, stop: StopRequest) -> Fetched:
    """The next `count` batches; fewer at their end, or if a signal arrives. Raises nothing that other processes miss."""
    if stop.number:
        return Fetched([])
    try:
        found = [batch for batch in (next(batches, None) for _ in range(count)) if batch is not None]
    except Stopped:  # while waiting for data; `stop.number` has the signal
        return Fetched([])
    except Exception as error:  # of an image, a worker, memory, ...: raised when all processes know
        traceback.clear_frames(error.__traceback__)  # frees the loader with its workers and files before the run saves
        return Fetched([], error)
    return Fetched(found)


class Agreed(NamedTuple):
    """What all processes do now."""

    signal: int  # the signal that one of them received, or 0
    due: bool  # one of them says that a checkpoint is due
    failure: Exception | None  # the error with which this process ends


def agree(stop: StopRequest, failure: Exception | None, bad: BadImages | None, due: bool = False) -> Agreed:
    """Exchanges signals, failures and bad images between the processes; all of them must call it."""
    fresh = len(bad.fresh) if bad else 0
    signal, any_due, failed, met = parallel.highest(stop.number, due, failure is not None, fresh)
    if met and bad:
        try:
            bad.exchange()
        except UserError as error:
            failed, failure = True, failure or error
    if failed and failure is None:
        failure = UserError(
            "another process of this run stopped, so this one stops too; see the message of that process"
        )
    return Agreed(signal, bool(any_due), failure)
