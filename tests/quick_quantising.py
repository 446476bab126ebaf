"""Makes `scalekd quantize` quick enough for tests: one trace, no latencies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scalekd.distill import quantised as in_training
from scalekd.models.int8 import graph
from scalekd.runs import int8_speed, quantize

FAST = {"median": 1.5, "low": 1.25, "high": 2.0, "rounds": 9}


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """Tracing takes seconds. Every start traces the run's student; a rebuilt run loads its weights afterwards.

    Writing the file of the trained student traces it for itself.
    """
    traced: list[Any] = []
    real = graph.graph_of

    def graph_of(*args: Any) -> Any:
        traced[:] = traced or [real(*args)]
        return traced[0]

    def teachers_file(model: Any, path: Path, card: Any) -> None:
        path.write_bytes(bytes(1000))

    patch.setattr(quantize, "graph_of", graph_of)
    patch.setattr(in_training, "graph_of", graph_of)
    patch.setattr(int8_speed, "export_onnx", teachers_file)
    patch.setattr(
        int8_speed, "latencies", lambda files, **_: {name: dict.fromkeys(("1", "16"), FAST) for name in files}
    )
