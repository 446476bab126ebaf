"""Writes a page that compares the logs of several runs; `report.run` writes the page of one run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from scalekd.common.files import make_folder, write_text

from .curves import TOP1, ReportRun, figure_curves, loss_curves, scores_table, time_bars
from .page import facts_section, page
from .svg import escape, finite

__all__ = ["ReportRun", "write_report"]


def write_report(
    path: Path,
    *,
    title: str,
    runs: list[ReportRun],
    facts: Mapping[str, str],
    figures: Mapping[str, str] = TOP1,
    teacher_top1: float | None = None,
) -> None:
    """Writes one self-contained HTML file. Gains are relative to the first run.

    figures: metrics of the validations, in %: key in the log -> name on the page. `ReportRun.score` and `teacher_top1` are
    values of the first. Raises `UserError` if the file cannot be written.
    """
    teacher_score = teacher_top1 if finite(teacher_top1) else None
    sections = [
        scores_table(runs, figures, teacher_score),
        figure_curves(runs, figures, teacher_score),
        loss_curves(runs),
        time_bars(runs),
        facts_section(facts),
    ]
    make_folder(path.parent)
    write_text(path, page(escape(title), sections))
