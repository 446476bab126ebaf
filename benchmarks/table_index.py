"""Measures how long it takes to open tables of paths and labels, with and without the search for copies of a run.

python benchmarks/table_index.py --rows 100000 > docs/results/table-index.json
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet
import torch

from scalekd.common.provenance import machine
from scalekd.data.options import Data
from scalekd.data.sources.open import open_source
from scalekd.data.split import open_split

CLASSES, FOLDERS = 80, 100


def write(root: Path, rows: int) -> None:
    """Empty files in folders, one.csv with a label a row, and sets.csv and sets.parquet with one to four."""
    draw = random.Random(0)
    names = [f"class {c}" for c in range(CLASSES)]
    for folder in range(FOLDERS):
        (root / f"{folder}").mkdir()
    with open(root / "one.csv", "w", newline="") as one, open(root / "sets.csv", "w", newline="") as sets:
        writers = csv.writer(one), csv.writer(sets)
        for writer in writers:
            writer.writerow(["path", "label"])
        for i in range(rows):
            path = f"{i % FOLDERS}/{i}.jpg"
            (root / path).touch()
            writers[0].writerow([path, draw.choice(names)])
            writers[1].writerow([path, "|".join(draw.sample(names, draw.randint(1, 4)))])
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(root / "sets.csv"), root / "sets.parquet")


def seconds(call: Callable[[], object]) -> list[float]:
    """Of three calls."""
    found = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        found.append(round(time.perf_counter() - began, 2))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, args.rows)
        texts = {
            name: f"{root / name}{':separator=pipe' * ('sets' in name)}"
            for name in ("one.csv", "sets.csv", "sets.parquet")
        }
        result = {
            "command": f"python benchmarks/table_index.py --rows {args.rows}",
            "machine": machine(torch.device("cpu")),
            "rows": args.rows,
            "open_seconds": {
                name: seconds(lambda text=text: open_source(text, "--data")) for name, text in texts.items()
            },
            "open_and_split_seconds": seconds(lambda: open_split(Data(train=texts["sets.csv"]))),
            "note": "empty files in 100 folders of a local disk; the split also takes their sizes, to find copies",
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
