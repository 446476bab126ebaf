"""The pages that `benchmarks/tables.py` fills show exactly the tables of docs/results."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
from tables import BLOCK, PAGES, filled, pictures  # noqa: E402


def test_every_result_is_shown_and_drawn():
    folder = ROOT / "docs" / "results" / "performance"
    shown = "".join(page.read_text() for page, results in PAGES.items() if results == folder)
    assert {file.stem for file in folder.glob("*.md")} <= {block[2] for block in BLOCK.finditer(shown)}
    drawn = pictures(folder)
    assert {file: file.read_text() for file in drawn} == drawn


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_shows_the_current_tables(page):
    assert filled(page.read_text(), PAGES[page]) == page.read_text()
    assert "Not measured yet" not in page.read_text()


def test_only_the_block_is_replaced(tmp_path):
    (tmp_path / "a.md").write_text("| new |\n")
    text = "before\n<!-- table a -->\n| old |\n<!-- end -->\nafter\n"
    assert filled(text, tmp_path) == "before\n<!-- table a -->\n\n| new |\n\n<!-- end -->\nafter\n"
    (tmp_path / "a.md").write_text("# Title\n\n| new |\n|---|\n| 1 |\n\nMore.\n\n| other |\n")
    assert filled(text, tmp_path) == "before\n<!-- table a -->\n\n| new |\n|---|\n| 1 |\n\n<!-- end -->\nafter\n"
