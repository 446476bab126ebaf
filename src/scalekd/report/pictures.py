"""Sections of the page with the figures that `scalekd analyze ... --out DIR` wrote."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from scalekd.common.errors import UserError
from scalekd.common.files import reject_links
from scalekd.common.text import in_shell

from .page import section
from .svg import escape

MOST_BYTES = 1_000_000  # of all figures together; base64 adds a third, and a page must stay below 2 MB


def analysis_sections(folders: Sequence[Path]) -> list[str]:
    """A section for each folder, with its PNG files. Raises `UserError` if a folder has none, or for more than MOST_BYTES."""
    sections, left = [], MOST_BYTES
    for folder in folders:
        reject_links(folder)
        files = sorted(folder.glob("*.png")) if folder.is_dir() else []
        if not files:
            raise UserError(
                f"`analyses`: {folder} has no figures; `scalekd analyze ... --out {in_shell(folder)}` writes some"
            )
        left -= sum(file.stat().st_size for file in files)
        if left < 0:
            raise UserError(
                f"`analyses`: the figures up to {folder} are more than {MOST_BYTES / 1e6:g} MB together; choose fewer folders"
            )
        figures = "".join(
            f'<figure class="wide"><img src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}" '
            f'alt="{escape(file.stem)}"><figcaption>{escape(file.stem)}</figcaption></figure>'
            for file in files
        )
        sections.append(section(f"Analysis: {escape(folder.name)}", figures, "The data are in that folder."))
    return sections
