"""A short version of benchmarks/faults.py: one real run, killed at three points."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_ends_as_one_that_was_never_killed():
    command = [sys.executable, FAULTS, "--kills", "3", "--variants", "1 process, 2 workers, 2 accumulated"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "3/3 bit-identical, 0 samples or files lost", done.stdout + done.stderr
    assert done.returncode == 0
