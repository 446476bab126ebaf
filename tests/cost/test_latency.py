"""`cost.latency`: files are timed in turns."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from scalekd.cost import latency


def test_latencies(monkeypatch):
    clock, calls = [0.0], []

    class Session:
        def __init__(self, name: str):
            self.name = name

        def get_inputs(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(name="images", type="tensor(float)", shape=["batch", 3, 8, 4])]

        def run(self, outputs: None, given: dict[str, np.ndarray]) -> None:
            calls.append((self.name, given["images"].shape))
            clock[0] += {"slow": 0.25, "fast": 0.125}[self.name]

    monkeypatch.setattr(latency, "_session", lambda file, threads: Session(file.stem))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    found = latency.latencies({name: Path(name) for name in ("slow", "fast")}, batches=(1, 4), seconds=7.5)
    assert found["slow"]["1"] == {"median": 250, "low": 250, "high": 250, "rounds": 10}  # 0.75 s a round
    assert found["fast"]["4"]["median"] == 125
    assert Counter(calls) == {(name, (n, 3, 8, 4)): 20 for name in ("slow", "fast") for n in (1, 4)}
    rounds = [tuple(name for name, _ in calls[i : i + 4]) for i in range(0, 40, 4)]
    assert set(rounds) == {("slow", "slow", "fast", "fast"), ("fast", "fast", "slow", "slow")}


def test_a_slow_file_is_timed_a_few_times(monkeypatch):
    with pytest.raises(ValueError):
        latency.summary([])
    assert latency.summary([1, 2, 3, 4, 5])["median"] == 3
    assert latency.summary([1, 2, 3, 4, 5])["low"] == 1.5
