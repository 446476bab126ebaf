"""Copies the tables of docs/results into docs/explanation/performance-tables.md and laboratory.md, and redraws the figures.

    python benchmarks/tables.py

The text between a marker line `<!-- table NAME -->` and the next `<!-- end -->` is replaced by NAME.md, or by its first
table if NAME.md has a title. Figures are written next to their JSON file as NAME.svg.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import drawing

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {
    DOCS / "explanation" / "performance-tables.md": DOCS / "results" / "performance",
    DOCS / "explanation" / "laboratory.md": DOCS / "results" / "lab",
}
BLOCK = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLE = re.compile(r"^\|(?:.*\n\|)*.*\n", re.MULTILINE)


def filled(text: str, folder: Path) -> str:
    """`text` with every block replaced by its file in `folder`; a block without a file says so."""

    def shown(block: re.Match[str]) -> str:
        file = folder / f"{block[2]}.md"
        return f"{block[1]}\n{shown_part(file.read_text()) if file.is_file() else 'Not measured yet.'}\n{block[3]}"

    return BLOCK.sub(shown, text)


def shown_part(text: str) -> str:
    """The part of a result file that a page shows: its first table if it has a title, otherwise all of it."""
    table = TABLE.search(text)
    return table[0] if table and text.startswith("# ") else text


def pictures(folder: Path) -> dict[Path, str]:
    """SVG file -> its content."""
    found = {}
    for file in sorted(folder.glob("parts-*.json")):
        pair = file.stem.removeprefix("parts-")
        found[file.with_suffix(".svg")] = drawing.parts(json.loads(file.read_text()), pair)
    growth = folder / "growth.json"
    if growth.is_file():
        found[growth.with_suffix(".svg")] = drawing.growth(json.loads(growth.read_text()))
    return found


if __name__ == "__main__":
    for page, folder in PAGES.items():
        page.write_text(filled(page.read_text(), folder))
    for picture, text in pictures(DOCS / "results" / "performance").items():
        picture.write_text(text)
