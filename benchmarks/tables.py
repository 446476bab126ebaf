"""Puts the tables of docs/results/performance into docs/performance.md, between its markers.

    python benchmarks/tables.py

A marker is a line `<!-- table NAME -->`; what stands between it and the next `<!-- end -->` becomes NAME.md.
"""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, folder: Path) -> str:
    """`text` with every block replaced by its file in `folder`; one without a file says so."""

    def shown(block: re.Match[str]) -> str:
        file = folder / f"{block[2]}.md"
        return f"{block[1]}\n{file.read_text() if file.is_file() else 'Not measured yet.'}\n{block[3]}"

    return BLOCK.sub(shown, text)


if __name__ == "__main__":
    page = DOCS / "performance.md"
    page.write_text(filled(page.read_text(), DOCS / "results" / "performance"))
