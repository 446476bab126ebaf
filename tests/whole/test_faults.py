"""A short version of benchmarks/faults.py: one real run, killed at three points."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import launcher
import pytest

FAULTS = Path(__file__).parents[2] / "benchmarks" / "faults.py"
STEPS, BATCH = 6, 4  # of an epoch


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_ends_as_one_that_was_never_killed(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("faults", FAULTS)
    faults = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faults)
    monkeypatch.setattr(faults, "STEPS", STEPS)
    monkeypatch.setattr(faults, "BATCH", BATCH)
    faults.RECIPE += [f"data.limit={STEPS * BATCH}", f"train.batch_size={BATCH}", "data.val_fraction=0.02"]
    monkeypatch.setattr(
        faults,
        "start_python",
        lambda command, environment, output: launcher.start(*command, env=environment, stdout=output, stderr=output),
    )
    code = faults.main(["--kills", "3", "--variants", "1 process, 2 workers, 2 accumulated"])
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "3/3 bit-identical, 0 samples or files lost", printed
    assert code == 0
