"""docs/performance.md shows the tables of docs/results/performance and no others."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
from tables import BLOCK, filled, pictures  # noqa: E402


def test_the_tables_are_those_of_the_results():
    page = (ROOT / "docs" / "performance.md").read_text()
    folder = ROOT / "docs" / "results" / "performance"
    assert {file.stem for file in folder.glob("*.md")} <= {block[2] for block in BLOCK.finditer(page)}
    assert filled(page, folder) == page
    drawn = pictures(folder)
    assert {file: file.read_text() for file in drawn} == drawn


def test_a_block_is_replaced_and_nothing_else(tmp_path):
    (tmp_path / "a.md").write_text("| new |\n")
    text = "before\n<!-- table a -->\n| old |\n<!-- end -->\nafter\n"
    assert filled(text, tmp_path) == "before\n<!-- table a -->\n\n| new |\n\n<!-- end -->\nafter\n"
