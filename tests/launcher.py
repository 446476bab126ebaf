"""Starts Python programs as processes of their own, forked from a warm process that has imported PyTorch and timm.

A fresh `python -m scalekd` imports for several seconds before it does anything. Tests that only need a process, to
send it a signal, to kill it, or to see its exit code and what it prints, start it here:

    done = launcher.run("-m", "scalekd", "train", recipe)       # as subprocess.run, with stdout and stderr kept
    running = launcher.start("-m", "scalekd", "train", recipe)  # as subprocess.Popen

The process has its own arguments, environment, working folder and output, and ends as any Python process does. What it
shares with others of the same pytest worker is what was imported, and the seed of Python's hashes. Each test of a start
itself starts a fresh process, and so does one whole run (test_stops.py) and one launch with torchrun (test_launch.py).
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
import shutil
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
LARGEST = 1 << 17  # bytes of a request
RELAYED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Done(NamedTuple):
    """What a process left; the names are those of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


class Running:
    """A process started by `start`; the names are those of `subprocess.Popen`. It is killed when this is deleted."""

    def __init__(self, channel: socket.socket, output: list[IO[bytes]]) -> None:
        self.channel, self.output = channel, output
        self.pid = int(channel.recv(99))
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code: minus the signal's number if the process was killed."""
        if self.returncode is None:
            if not select.select([self.channel], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            self.returncode = int(self.channel.recv(99))
            self.channel.close()
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
    output: list[Any] = [stdout or tempfile.TemporaryFile(), stderr or tempfile.TemporaryFile()]  # noqa: SIM115
    request = {"command": [str(c) for c in command], "env": dict(env or os.environ), "cwd": str(cwd or Path.cwd())}
    return Running(_ask(_warm_process(), request | {"fork_server": fork_server}, output), output)


def run(*command: object, timeout: float = 280.0, **options: Any) -> Done:
    """Runs `python COMMAND` to its end. The options are those of `start`."""
    running = start(*command, **options)
    return Done(*_output_and_code(running, timeout))


def two_processes(*command: object, timeout: float = 280.0, env: dict[str, str] | None = None) -> tuple[Done, Done]:
    """Runs `python COMMAND` as the two processes of one group, with the variables by which they find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env = dict(env or os.environ) | group
    both = [start(*command, env=env | {"RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    end = time.monotonic() + timeout
    first, second = (Done(*_output_and_code(running, end - time.monotonic())) for running in both)
    return first, second


def _output_and_code(running: Running, timeout: float) -> tuple[int, str, str]:
    out, err = running.communicate(timeout)
    return running.wait(), out, err


@functools.cache
def stand_ins() -> Path:
    """A folder with commands `python`, `scalekd` and `torchrun` that run in a process forked from the warm one.

    For programs that start others by name. Signals go on to that process, and it is killed when its stand-in is.
    """
    at = _warm_process()
    code = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import launcher; launcher._stand_in({at!r})"
    texts = {
        "python": f"#!{sys.executable} -IS\n{code}\n",
        "scalekd": f'#!/bin/sh\nexec {Path(at).parent}/python -m scalekd "$@"\n',
        "torchrun": f'#!/bin/sh\nexec {Path(at).parent}/python -m torch.distributed.run "$@"\n',
    }
    for name, text in texts.items():
        path = Path(at).with_name(name)
        path.write_text(text)
        path.chmod(0o755)
    return Path(at).parent


def _stand_in(at: str) -> None:
    request = {"command": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd(), "fork_server": False}
    running = Running(_ask(at, request, [sys.stdout, sys.stderr]), [])
    for number in RELAYED:
        signal.signal(number, lambda number, _: os.kill(running.pid, number))
    code = running.wait()
    if code < 0:  # so that ours is the same
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _ask(at: str, request: dict[str, Any], output: list[Any]) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.connect(at)
    socket.send_fds(channel, [json.dumps(request).encode()], [file.fileno() for file in output])
    return channel


# ---------------------------------------------------------------- the warm process


@functools.cache
def _warm_process() -> str:
    """The address of this pytest worker's warm process, which ends with it."""
    folder = tempfile.mkdtemp(prefix="warm-")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{folder}/address")
        listener.listen(64)
        command = [sys.executable, __file__, str(listener.fileno())]
        warm = subprocess.Popen(command, pass_fds=[listener.fileno()], stdin=subprocess.PIPE, start_new_session=True)

    def end() -> None:
        warm.communicate()  # closes its input
        shutil.rmtree(folder)

    atexit.register(end)
    return f"{folder}/address"


def _serve(listener: socket.socket) -> dict[str, Any] | None:
    """Forks a process for each request. Returns the request in the forked process, and None here at the end."""
    while True:
        ready, *_ = select.select([listener, 0], [], [])
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # those that ended
                pass
        if 0 in ready:
            return None
        channel = listener.accept()[0]
        if os.fork() == 0:
            listener.close()
            return _fork_and_watch(channel)
        channel.close()


def _fork_and_watch(channel: socket.socket) -> dict[str, Any]:
    """Returns the request in a new process, its output in place. The calling process watches that one and ends."""
    text, files, *_ = socket.recv_fds(channel, LARGEST, 2)
    pid = os.fork()
    if pid == 0:
        channel.close()
        os.setsid()
        with open(os.devnull) as nothing:
            for number, file in enumerate([nothing.fileno(), *files]):
                os.dup2(file, number)
        for file in files:
            os.close(file)
        return json.loads(text)
    try:
        channel.send(str(pid).encode())
        if channel in select.select([os.pidfd_open(pid), channel], [], [])[0]:  # whoever asked is gone
            os.kill(pid, signal.SIGKILL)
        channel.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    finally:
        os._exit(0)


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
    kind, *rest = [word for word in command[:1] if word != "-u"] + command[1:]
    if kind == "-m":
        sys.path[0], sys.argv = cwd, rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = str(Path(kind).parent), [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


def no_fsync(handle: int) -> None:
    """Instead of `os.fsync` in tests: a file is read back without it, and a run writes about twenty."""


if __name__ == "__main__":
    os.fsync = no_fsync
    for _name in IMPORTED:
        importlib.import_module(_name)
    gc.freeze()  # or each process would visit, and so copy, all of it when it ends
    _request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if _request:
        _become(**_request)
