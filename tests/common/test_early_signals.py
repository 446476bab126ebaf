"""Signals while the command's modules are being imported."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import scalekd
from scalekd.common.early_signals import EXIT_CODES, runs_as_command

SRC = Path(scalekd.__file__).parents[1]
# the signal arrives when `import scalekd` looks for its first module after those of `common` and the standard library
PROGRAM = """
import os, sys
sys.argv, number, ignored = [sys.argv[1]], int(sys.argv[2]), int(sys.argv[3])
sys.path.insert(0, {src!r})
if ignored or number == 1:  # the tests themselves may run under nohup
    import signal
    signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
class Finder:
    @staticmethod
    def find_spec(name, *_):
        if name.startswith("scalekd.") and not name.startswith("scalekd.common"):
            os.kill(os.getpid(), number)
            os._exit(99)
sys.meta_path.insert(0, Finder)
import scalekd
"""


def code_of(name: str, number: int, ignored: bool = False) -> tuple[int, str]:
    words = [name, str(int(number)), str(int(ignored))]
    program = PROGRAM.format(src=str(SRC))
    done = subprocess.run([sys.executable, "-S", "-c", program, *words], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize("number", EXIT_CODES)
def test_a_signal_before_the_command_has_its_exit_code(number):
    code, err = code_of("/usr/bin/scalekd", number)
    assert code == EXIT_CODES[number] and f"stopped by {signal.Signals(number).name}; run the same" in err


def test_only_the_command_answers(monkeypatch):
    """A program that imports scalekd keeps its own handlers, and `nohup` its closed terminal."""
    assert code_of("train.py", signal.SIGTERM)[0] == -signal.SIGTERM
    assert code_of("scalekd", signal.SIGHUP, ignored=True)[0] == 99
    monkeypatch.setattr(sys, "argv", ["-m"])
    for words, expected in ((["python", "-m", "scalekd", "train"], True), (["python", "-m", "pytest"], False)):
        monkeypatch.setattr(sys, "orig_argv", words)
        assert runs_as_command() == expected
