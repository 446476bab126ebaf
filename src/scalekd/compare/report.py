"""The page of a comparison: what `scalekd compare` ends in, with the way to the reports of its runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from scalekd.common.errors import UserError
from scalekd.common.files import make_folder, write_text
from scalekd.report.folder import read_json
from scalekd.report.page import folded, section
from scalekd.report.pictures import analysis_sections
from scalekd.report.run import report
from scalekd.report.svg import escape

from .page import html


def is_comparison(folder: Path) -> bool:
    return not (folder / "recipe.yaml").exists() and "students" in read_json(folder / "summary.json")


def write_comparison(folder: Path, path: Path, summary: dict[str, Any] | None = None, more: Sequence[str] = ()) -> None:
    """summary: as `compare.results.summary` makes it; read from the folder unless given. Raises `UserError`."""
    try:
        text = html(summary or read_json(folder / "summary.json"), [*more, run_links(folder, path.parent)])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'summary.json'} is not what this version writes (no {error}); `scalekd compare` with the same "
            "--out makes it anew"
        ) from None
    write_text(path, text)


def report_comparison(folder: Path, analyses: Sequence[Path] = (), out: Path | None = None) -> Path:
    """Writes the page of a finished comparison anew. Raises `UserError`.

    analyses: folders that `scalekd analyze ... --out` wrote. out: report.html in the folder unless given.
    """
    path = out or folder / "report.html"
    make_folder(path.parent)
    write_comparison(folder, path, more=analysis_sections(analyses))
    return path


def report_any(
    folder: Path,
    device: str | None = None,
    *,
    baselines: Sequence[Path] = (),
    data: str | None = None,
    images: int | None = None,
    analyses: Sequence[Path] = (),
    out: Path | None = None,
) -> tuple[Path, list[str]]:
    """`report` for a run's folder, `report_comparison` for a comparison's. Raises `UserError`."""
    if not is_comparison(folder):
        return report(folder, device, baselines=baselines, data=data, images=images, analyses=analyses, out=out)
    given = {"baselines": baselines, "data": data, "images": images, "device": device}
    if unused := " and ".join(f"`{name}`" for name, value in given.items() if value):
        raise UserError(f"{folder} is a comparison, whose page is made of its results: leave out {unused}")
    return report_comparison(folder, analyses, out), []


def run_links(folder: Path, at: Path) -> str:
    """A section with the reports of the runs, as seen from a page in the folder `at`."""
    reports = sorted(folder.glob("runs/*/*/seed-*/report.html"))
    items = "".join(
        f'<li><a href="{quote(Path(os.path.relpath(file, at)).as_posix())}">'
        f"{escape(' '.join(file.parent.relative_to(folder / 'runs').parts))}</a></li>"
        for file in reports
    )
    return section("Its runs", folded(f"{len(reports)} reports", f"<ul>{items}</ul>")) if reports else ""
