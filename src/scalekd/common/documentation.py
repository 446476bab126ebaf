"""The pages of the documentation, which are part of the package: `scalekd docs`."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import UserError, nearest
from .text import printable

FOLDER = Path(__file__).parent / "docs"  # a link to docs/ in a checkout, a copy in an installation
PARTS = ("", "tutorials", "how-to", "reference", "explanation")


def pages() -> dict[str, Path]:
    """Name -> file of every page, in the order of the documentation."""
    return {file.stem: file for part in PARTS for file in sorted((FOLDER / part).glob("*.md"))}


def title(file: Path) -> str:
    """The first heading of a page."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("# ")), file.stem)


def page_text(name: str) -> str:
    """The Markdown of a page, named as in `any-teacher` or `docs/how-to/any-teacher.md`. Raises `UserError`."""
    known = pages()
    stem = name.removesuffix(".md").rpartition("/")[2]
    if stem not in known:
        raise UserError(f"no page `{printable(name)}`.{nearest(stem, known)} `scalekd docs` lists all pages")
    return known[stem].read_text(encoding="utf-8")


def as_commands(text: str) -> str:
    """`text` with the command that prints a page, in place of the page's path in a checkout."""
    return re.sub(r"\bdocs/(?:[a-z-]+/)?([a-z-]+)\.md\b", r"`scalekd docs \1`", text)
