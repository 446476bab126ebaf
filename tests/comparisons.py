"""The summary of an invented comparison."""

from __future__ import annotations

import copy
from typing import Any


def cell(seeds: list[int], top1: list[float], **more: Any) -> dict[str, Any]:
    """The results of one method on one student."""
    mean = sum(top1) / len(top1) if top1 else None
    curve = [[1000 * i, mean - 30 / i] for i in range(1, 9)] if top1 else []
    some = {"ci95": None, "seconds": 40.25, "steps": 900, "reach": 0.8, "curve": curve}
    return {"seeds": seeds, "top1": top1, "mean": mean} | some | more


def against(
    gain: float | None, half: float | None, p: float | None, p_holm: float | None, pairs: int
) -> dict[str, Any]:
    """The paired gain of a method over the baseline."""
    return {"gain": gain, "gain_ci95": half, "p": p, "p_holm": p_holm, "pairs": pairs}


def summary(**changes: Any) -> dict[str, Any]:
    """Two students, three seeds; `crd` misses one seed on the CNN and has no run yet on the Mixer."""
    three = [0, 1, 2]
    cnn = {
        "baseline": cell(three, [55.0, 56.0, 57.0], ci95=2.484),
        "kd": cell(three, [56.1, 57.0, 58.2], ci95=2.61, **against(1.1, 0.25, 0.0031, 0.0062, 3)),
        "crd": cell([0, 2], [54.5, 57.1], ci95=16.5, **against(-0.2, 3.8, 0.63, 0.63, 2)),
    }
    mixer = {
        "baseline": cell(three, [40.0, 41.0, 42.0], ci95=2.484),
        "kd": cell(three, [40.5, 42.0, 42.5], ci95=2.58, **against(2 / 3, 0.72, 0.057, 0.114, 3)),
        "crd": cell([], [], seconds=None, steps=None, reach=None, **against(None, None, None, None, 0)),
    }
    whole = {
        "name": "ladder",
        "title": "The paper's ladder",
        "about": ["All methods,", "two students.", "", "Equal samples."],
        "command": "scalekd compare ladder.yaml",
        "machine": "CPU, 2 threads",
        "versions": {"scalekd": "0.3.0", "torch": "2.6.0"},
        "commits": ["abc123"],
        "seeds": three,
        "baseline": "baseline",
        "metric": "top-1 %",
        "teacher_top1": 84.2,
        "wall_seconds": 1234.5,
        "run_seconds": 4321.0,
        "planned": 18,
        "finished": 14,
        "students": {"CNN": cnn, "Mixer": mixer},
        "failed": [{"student": "CNN", "method": "crd", "seed": 1, "error": "RuntimeError: nan\nin the loss"}],
    }
    return copy.deepcopy(whole | changes)
