"""Starts Python programs as processes of their own, forked from a warm process that has imported PyTorch and timm.

A fresh `python -m scalekd` imports for several seconds before it does anything. Tests that only need a process, to
send it a signal, to kill it, or to see its exit code and what it prints, start it here:

    done = launcher.run("-m", "scalekd", "train", recipe)       # as subprocess.run, with stdout and stderr kept
    running = launcher.start("-m", "scalekd", "train", recipe)  # as subprocess.Popen

The process has its own arguments, environment, working folder and output, and ends as any Python process does. What it
shares with others of the same pytest worker is what was imported, and the seed of Python's hashes. Each test of a start
itself, and at least one test of each kind of run, starts a fresh process.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import IO, Any, NamedTuple

IMPORTED = ["scalekd.cli.app", "scalekd.compare.compare", "scalekd.runs.distillation", "scalekd.runs.transfer", "timm"]
LARGEST = 1 << 20  # bytes of a request


class Done(NamedTuple):
    """What a process left; the names are those of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


class Running:
    """A process started by `start`; the names are those of `subprocess.Popen`."""

    def __init__(self, status: int, output: tuple[IO[bytes], IO[bytes]]) -> None:
        self.status = os.fdopen(status)  # the process's number, and later its exit code
        self.output = output
        self.pid = int(self.status.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code: minus the signal's number if the process was killed."""
        if self.returncode is None:
            if not select.select([self.status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            self.returncode = int(self.status.readline())
            self.status.close()
        return self.returncode

    def poll(self) -> int | None:
        """The exit code, or None while the process runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits, and returns what was printed to stdout and stderr where `start` was given no file."""
        self.wait(timeout)
        texts = []
        for file in self.output:
            file.seek(0)
            texts.append(file.read().decode())
            file.close()
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    *command: object,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    stdout: IO[Any] | None = None,
    stderr: IO[Any] | None = None,
    fork_server: bool = False,
) -> Running:
    """Starts `python COMMAND`: `-m MODULE`, `-c CODE` or a file, and arguments. Output goes to files.

    env, cwd: by default this process's, as they are now. stdout, stderr: open files. fork_server: the program starts
    processes with multiprocessing's fork server, which is then a warm one too.
    """
    request = {"command": [str(c) for c in command], "env": dict(env or os.environ), "cwd": str(cwd or Path.cwd())}
    request["fork_server"] = fork_server
    output = (stdout or tempfile.TemporaryFile(), stderr or tempfile.TemporaryFile())  # noqa: SIM115 - kept by Running
    read, write = os.pipe()
    files = [output[0].fileno(), output[1].fileno(), write]
    socket.send_fds(_warm_process(), [json.dumps(request).encode()], files)
    os.close(write)
    return Running(read, output)


def run(*command: object, timeout: float = 280.0, **options: Any) -> Done:
    """Runs `python COMMAND` to its end. The options are those of `start`."""
    running = start(*command, **options)
    try:
        out, err = running.communicate(timeout)
    finally:
        running.kill()
    return Done(running.wait(), out, err)


def two_processes(*command: object, timeout: float = 280.0, env: dict[str, str] | None = None) -> tuple[Done, Done]:
    """Runs `python COMMAND` as the two processes of one group, as torchrun does, with the variables that it sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env = (env or dict(os.environ)) | group
    both = [start(*command, env=env | {"RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    end = time.monotonic() + timeout
    try:
        printed = [running.communicate(end - time.monotonic()) for running in both]
    finally:
        for running in both:
            running.kill()
    first, second = (Done(running.wait(), *texts) for running, texts in zip(both, printed))
    return first, second


# ---------------------------------------------------------------- the warm process


@functools.cache
def _warm_process() -> socket.socket:
    """A channel to this pytest worker's warm process, which ends when the channel is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGEST)
    command = [sys.executable, __file__, str(theirs.fileno())]
    warm = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
    theirs.close()
    atexit.register(lambda: (ours.close(), warm.wait()))
    return ours


def _serve(channel: socket.socket) -> dict[str, Any] | None:
    """Forks a process for each request. Returns the request in the forked process, and None here at the end."""
    while True:
        text, files, *_ = socket.recv_fds(channel, LARGEST, 3)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # those that ended
                pass
        if not text:
            return None
        if os.fork() == 0:
            channel.close()
            _fork_and_wait(files)
            return json.loads(text)
        for file in files:
            os.close(file)


def _fork_and_wait(files: list[int]) -> None:
    """Returns in a new process with its output in place. The process that called this one waits for it and ends."""
    out, err, status = files
    pid = os.fork()
    if pid:
        os.write(status, f"{pid}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(status, f"{code}\n".encode())
        os._exit(0)
    os.setsid()
    os.dup2(out, 1)
    os.dup2(err, 2)
    for file in files:
        os.close(file)


def _start_fork_server() -> None:
    """Starts multiprocessing's fork server by a fork; by itself it would start Python and import anew."""

    def forked(path: str, words: list[str], kept: tuple[int, ...]) -> int:
        pid = os.fork()
        if pid:
            return pid
        for file in map(int, os.listdir("/proc/self/fd")):
            if file > 2 and file not in kept:
                with contextlib.suppress(OSError):  # the one that listed them
                    os.close(file)
        try:
            exec(words[-1], {})
        finally:
            os._exit(0)

    resource_tracker.ensure_running()
    forkserver.util.spawnv_passfds, normal = forked, forkserver.util.spawnv_passfds
    forkserver.ensure_running()
    forkserver.util.spawnv_passfds = normal


def _become(command: list[str], env: dict[str, str], cwd: str, fork_server: bool) -> None:
    """Does what `python COMMAND` does."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if fork_server:
        _start_fork_server()
    kind, *rest = command
    if kind == "-m":
        sys.path[0], sys.argv = cwd, rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = str(Path(kind).parent), command
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    for _name in IMPORTED:
        importlib.import_module(_name)
    gc.freeze()  # or each process would visit, and so copy, all of it when it ends
    _request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if _request:
        _become(**_request)
