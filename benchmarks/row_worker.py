"""Runs functions in a process of their own, each with a time limit, so that one that hangs or crashes costs its row only.

The process is used for one call after another, because importing PyTorch and starting CUDA take seconds. After a time
limit or a crash the next call gets a new one.

    python benchmarks/row_worker.py  # the process: reads calls as lines of JSON, answers with lines of JSON
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

ENDED = "the process ended: exit code"


class Worker:
    """Calls functions in another process. extra: variables of that process's environment, besides this one's."""

    def __init__(self, extra: dict[str, str] | None = None):
        self.extra = extra or {}
        self.process: subprocess.Popen[bytes] | None = None

    def call(self, function: str, options: dict[str, Any], seconds: float) -> dict[str, Any]:
        """{"result": what `MODULE.NAME` returned}, or {"error": why there is none}. Both must be JSON."""
        if self.process is None:
            command = [sys.executable, str(Path(__file__).resolve())]
            self.process = subprocess.Popen(
                command,
                env=os.environ | self.extra,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"function": function, "options": options}).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            return self._ended()
        with selectors.DefaultSelector() as waiting:
            waiting.register(process.stdout, selectors.EVENT_READ)
            if not waiting.select(max(0.0, seconds)):
                self.close()
                return {"error": f"stopped at its limit of {seconds:.0f} s"}
        answer = process.stdout.readline()
        return json.loads(answer) if answer.endswith(b"\n") else self._ended()

    def _ended(self) -> dict[str, Any]:
        assert self.process is not None
        code = self.process.wait()
        self.close()
        return {"error": f"{ENDED} {code}"}

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # with its data workers and compilers
            self.process.communicate()
            self.process = None


def serve() -> None:
    """Answers calls until there are none. What functions print goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # also for what libraries and compilers print
    for line in sys.stdin:
        asked = json.loads(line)
        module, _, name = asked["function"].rpartition(".")
        try:
            answer = {"result": getattr(importlib.import_module(module), name)(**asked["options"])}
        except Exception as error:  # it belongs into the row
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    serve()
