"""Writes a comparison's HTML page, with links to the reports of its runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from scalekd.common.errors import UserError
from scalekd.common.files import make_folder, reject_links, write_text
from scalekd.report.folder import read_json
from scalekd.report.page import folded, section
from scalekd.report.pictures import analysis_sections
from scalekd.report.run import report
from scalekd.report.svg import escape

from .page import html


def is_comparison(folder: Path) -> bool:
    return not (folder / "recipe.yaml").exists() and "students" in read_json(folder / "summary.json")


def write_comparison(folder: Path, path: Path, summary: dict[str, Any] | None = None, more: Sequence[str] = ()) -> None:
    """Writes the page of the comparison in `folder` to `path`.

    summary: from `compare.results.summary`; by default read from the folder.
    more: HTML sections to add before the facts.
    Raises `UserError` if summary.json lacks a key.
    """
    try:
        text = html(summary or read_json(folder / "summary.json"), [*more, run_links(folder, path.parent)])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(
            f"{folder / 'summary.json'} was not written by this version (no {error}); run `scalekd compare` again with "
            "the same `out` to rewrite it"
        ) from None
    write_text(path, text)


def report_comparison(folder: Path, analyses: Sequence[Path] = (), out: Path | None = None) -> Path:
    """Writes the page of a finished comparison again and returns its path. Raises `UserError`.

    analyses: folders that `scalekd analyze ... --out` wrote. out: by default report.html in `folder`.
    """
    path = out or folder / "report.html"
    make_folder(path.parent)
    write_comparison(folder, path, more=analysis_sections(analyses))
    return path


def report_any(
    folder: Path, device: str | None = None, *, analyses: Sequence[Path] = (), out: Path | None = None, **options: Any
) -> tuple[Path, list[str]]:
    """`report` for a run's folder, `report_comparison` for a comparison's. Raises `UserError`.

    options: of `report`, for a run only. Returns the path of the page, and a line for each section that is missing.
    """
    reject_links(folder)
    if not is_comparison(folder):
        return report(folder, device, analyses=analyses, out=out, **options)
    if unused := " and ".join(f"`{name}`" for name, value in (options | {"device": device}).items() if value):
        raise UserError(f"{folder} is a comparison and its page shows its results alone; leave out {unused}")
    return report_comparison(folder, analyses, out), []


def run_links(folder: Path, page_folder: Path) -> str:
    """An HTML section that links to the reports of the runs, relative to `page_folder`."""
    reports = sorted(folder.glob("runs/*/*/seed-*/report.html"))
    items = "".join(
        f'<li><a href="{quote(Path(os.path.relpath(file, page_folder)).as_posix())}">'
        f"{escape(' '.join(file.parent.relative_to(folder / 'runs').parts))}</a></li>"
        for file in reports
    )
    return section("Runs", folded(f"{len(reports)} reports", f"<ul>{items}</ul>")) if reports else ""
