"""docs/explanation/performance.md and docs/explanation/laboratory.md show the tables of docs/results and no others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
from tables import BLOCK, PAGES, filled, pictures  # noqa: E402


def test_the_tables_are_those_of_the_results():
    page = (ROOT / "docs" / "explanation" / "performance.md").read_text()
    folder = ROOT / "docs" / "results" / "performance"
    assert {file.stem for file in folder.glob("*.md")} <= {block[2] for block in BLOCK.finditer(page)}
    drawn = pictures(folder)
    assert {file: file.read_text() for file in drawn} == drawn


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_shows_what_is_there(page):
    assert filled(page.read_text(), PAGES[page]) == page.read_text()
    assert "Not measured yet" not in page.read_text()


def test_a_block_is_replaced_and_nothing_else(tmp_path):
    (tmp_path / "a.md").write_text("| new |\n")
    text = "before\n<!-- table a -->\n| old |\n<!-- end -->\nafter\n"
    assert filled(text, tmp_path) == "before\n<!-- table a -->\n\n| new |\n\n<!-- end -->\nafter\n"
    (tmp_path / "a.md").write_text("# Title\n\n| new |\n|---|\n| 1 |\n\nMore.\n\n| other |\n")
    assert filled(text, tmp_path) == "before\n<!-- table a -->\n\n| new |\n|---|\n| 1 |\n\n<!-- end -->\nafter\n"
