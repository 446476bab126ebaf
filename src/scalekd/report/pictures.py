"""Figures that `scalekd analyze ... --out DIR` wrote, put into a page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from scalekd.common.errors import UserError

from .page import section
from .svg import escape

MOST_BYTES = 1_000_000  # of all pictures together: base64 makes a third more of it, and a page stays below 2 MB


def analysis_sections(folders: Sequence[Path]) -> list[str]:
    """A section for each folder, with its PNG files. Raises `UserError`, also for more than fits into a page."""
    sections, left = [], MOST_BYTES
    for folder in folders:
        files = sorted(folder.glob("*.png")) if folder.is_dir() else []
        if not files:
            raise UserError(f"--analysis: {folder} holds no figures; `scalekd analyze ... --out {folder}` writes some")
        left -= sum(file.stat().st_size for file in files)
        if left < 0:
            raise UserError(
                f"--analysis: the figures up to {folder} are more than {MOST_BYTES / 1e6:g} MB together; name fewer folders"
            )
        figures = "".join(
            f'<figure class="wide"><img src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}" '
            f'alt="{escape(file.stem)}"><figcaption>{escape(file.stem)}</figcaption></figure>'
            for file in files
        )
        sections.append(section(f"Analysis: {escape(folder.name)}", figures, "The data behind it are in that folder."))
    return sections
