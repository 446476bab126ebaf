"""Makes the table of the runs of lab/transfer-teacher.sh: `lab/transfer_teacher.py runs/transfer-teacher OUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transfer import FIGURES, figures, table, write

STARTS = ("alone", "mlp", "cap")
KEYS = FIGURES | {"retinanet": {"box_ap": "box AP %"}}


def main(runs: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lines = [
        "# A teacher in the loop of detectors and segmenters",
        "",
        "`lab/transfer-teacher.sh` made these. Mean ± half of the 95 % interval over seeds (Student's t), then the same of",
        "the differences from the run of the same seed without a teacher. mlp and cap are projectors.",
        "",
    ]
    results: dict[str, Any] = {}
    for task, keys in KEYS.items():
        results[task] = figures(runs, task, STARTS, keys)
        if any(found["seconds"] for found in results[task].values()):
            lines += table(results[task], f"{task}, teacher", keys, "alone")
    write(runs, out, results, lines)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
