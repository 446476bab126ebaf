"""Loads batches in worker processes, and waits for them without hanging.

A PyTorch loader waits for ever for a worker that was stopped, and for a batch that got lost because a worker had no
shared memory or no file descriptor to send it. Here a thread looks at signals and at the workers during a wait.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, _utils, get_worker_info

from scalekd.common.errors import UserError
from scalekd.common.stop import Stopped, current, leave_signals_to_parent

SILENCE = 120.0  # seconds without a batch, in which no worker does anything, after which the workers count as hung
IDLE = 0.1  # seconds of processor time that idle workers use at most meanwhile, to look for work
LOOK = 1.0  # seconds between two looks at a wait


def count(workers: int) -> int:
    """The worker processes that are started for `data.workers`: at most one per CPU core."""
    return min(workers, os.cpu_count() or 1)  # the images do not depend on the number


def loaded(
    images: Dataset, sampler: Sampler, workers: int, pin: bool, collate: Callable[[list[Any]], Any]
) -> Generator[Any, None, None]:
    """The collated batches of the keys from `sampler`, read by worker processes, or in this one if `workers` is 0.

    Raises:
        Stopped: if a signal arrived while waiting for a worker.
        UserError: if the workers hang.
        RuntimeError, OSError: of PyTorch, if a worker ended or lacks something; `common.out_of_memory` explains them.
    """
    workers = count(workers)
    loader = DataLoader(
        images,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_Shared(collate) if workers else collate,
        pin_memory=pin,
        worker_init_fn=_start_worker,
    )
    if not workers:
        yield from loader
        return
    known = {process.pid for process in multiprocessing.active_children()}
    iterator: Any = None
    watch: _Watch | None = None
    processes: list[BaseProcess] = []
    try:
        try:
            iterator = iter(loader)
        finally:  # some may run although not all could be started
            processes = [p for p in multiprocessing.active_children() if p.pid not in known]
        watch = _Watch(processes)
        watch.start()
        while True:
            try:
                batch = _next(iterator, watch)
            except StopIteration:
                return
            yield batch
    except (Exception, Stopped, GeneratorExit) as end:  # the last: whoever took the batches wants no more
        _kill(processes)  # PyTorch would wait for each of them
        _abandon(_begun(end) if iterator is None else iterator)
        if watch and watch.reason and isinstance(end, RuntimeError):  # PyTorch's, of a worker that the watch killed
            raise watch.reason from None
        raise
    finally:
        if watch:
            watch.done.set()
        iterator = None  # ends the workers
        _kill(processes)  # hung ones would hold up the end of this process


def _next(iterator: Any, watch: _Watch) -> Any:
    """The next batch of a loader's iterator. Raises the watch's reason if it ended the wait."""
    watch.since = time.monotonic()
    try:
        return next(iterator)
    except StopIteration:
        raise
    except Exception as error:
        if watch.reason is not None:
            raise watch.reason from None
        if isinstance(error, RuntimeError) and error.__cause__ is not None:
            raise RuntimeError(f"{error}: {error.__cause__}") from None  # the cause has the worker's exit code
        raise
    finally:
        watch.since = None


class _Watch(threading.Thread):
    """Kills the workers of a loader if a signal arrives while the main thread waits for them, or if they hang.

    A thread, because the main thread may wait in a system call: a stopped worker still has to hand over the memory of
    the batches that it sent. Killing the workers ends that call.
    """

    def __init__(self, processes: Sequence[BaseProcess]):
        super().__init__(daemon=True)
        self.processes, self.done = processes, threading.Event()
        self.since: float | None = None  # when the current wait began; None: the main thread does not wait
        self.reason: UserError | Stopped | None = None

    def run(self) -> None:
        seen, quiet, busy = None, 0.0, None
        while not self.done.wait(LOOK):
            now, since, used = time.monotonic(), self.since, _processor_seconds(self.processes)
            if since is None:
                continue
            if since != seen or used is None or busy is None or used - busy > IDLE:
                seen, quiet, busy = since, now, used
            if (number := current().number) and now - since > LOOK:
                self._end(Stopped(number, current().saved))
            elif now - quiet > SILENCE:
                self._end(
                    UserError(
                        f"no batch for {SILENCE:.0f} s, and the {len(self.processes)} data loader workers do nothing.\n"
                        "They may lack shared memory (docker run --shm-size=8g), wait for a file system, or have been "
                        "stopped; try data.workers=0. The same command resumes the run."
                    )
                )

    def _end(self, reason: UserError | Stopped) -> None:
        self.reason = reason
        self.done.set()
        for process in self.processes:
            process.kill()


def _processor_seconds(processes: Iterable[BaseProcess]) -> float | None:
    """The processor time that processes have used; None where the system does not list it."""
    total = 0
    try:
        for process in processes:
            with open(f"/proc/{process.pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            total += int(fields[11]) + int(fields[12])  # of user and system, in clock ticks
    except (OSError, IndexError):
        return None
    return total / os.sysconf("SC_CLK_TCK")


def _kill(processes: Iterable[BaseProcess]) -> None:
    """Kills workers of this process, stopped ones too. PyTorch's handler would raise an error for each that ends.

    A worker of a second loader is a copy of this process. If it collects the copy of an unfinished `loaded`, the
    workers of the first loader are not its own, and it leaves them alone.
    """
    own = multiprocessing.active_children()
    processes = [process for process in processes if process in own]
    if not processes or threading.current_thread() is not threading.main_thread():
        return
    handler = _without_handler()
    try:
        for process in processes:
            process.kill()
        for process in processes:
            process.join(5)
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _without_handler() -> Any:
    """Sets the default handler of SIGCHLD and returns the one before."""
    while True:
        try:
            handler = signal.getsignal(signal.SIGCHLD)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return handler
        except RuntimeError:  # PyTorch's handler, for a worker that ended just now
            continue


def _begun(error: BaseException) -> Any:
    """The iterator whose workers could not all be started, from the error's traceback; None if there is none."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        values = frame.f_locals
        if hasattr(values.get("self"), "_index_queues"):
            found = values["self"]
        if isinstance(values, dict):  # up to Python 3.12 a copy, which would keep the iterator and its files
            values.clear()
    return found


def _abandon(iterator: Any) -> None:
    """Keeps PyTorch from ending an iterator whose workers were killed.

    It would set an event, and wait for ever if a worker held the event's lock when it was killed. In a copy of this
    process it would end the workers of the original.
    """
    if iterator is None or getattr(iterator, "_shutdown", True):
        return
    iterator._shutdown = True
    if iterator._worker_pids_set:
        _utils.signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    if hasattr(iterator, "_pin_memory_thread_done_event"):
        iterator._pin_memory_thread_done_event.set()
    for queue in iterator._index_queues:
        queue.cancel_join_thread()
        queue.close()


# ---------------------------------------------------------------- in a worker


class _Shared:
    """Collates, and moves the tensors to shared memory at once.

    PyTorch does it later in a thread whose errors nobody hears: the batch is lost.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        batch = self.collate(samples)
        if get_worker_info() is not None:
            for tensor in tensors_of(batch):
                tensor.share_memory_()
        return batch


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(batch, Tensor):
        return [batch]
    inside = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else ()
    return [tensor for part in inside for tensor in tensors_of(part)]


def _start_worker(worker: int) -> None:
    leave_signals_to_parent(worker)
    sys.excepthook = _end_without_files
    # the thread that sends batches prints its errors and forgets the batch: end the worker instead, which PyTorch sees
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def _end_worker(error: Exception, batch: Any) -> None:
    """The exit code is the reason; `common.out_of_memory` reads it."""
    os._exit(errno.EMFILE if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) else errno.ENOSPC)


def _end_without_files(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """For an error in a thread. The one that hands over memory would print this error again and again."""
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        os._exit(errno.EMFILE)
    sys.__excepthook__(kind, error, trace)
